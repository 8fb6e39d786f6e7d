// The control ABI from C: which cache would a model's routing want? Replays made-up routing through the pager's policy and through
// others (spac_simulate() needs no model), and shows how errors are told.
//
//   cc example.c -I../include -L../lib -lspac -Wl,-rpath,'$ORIGIN/../lib' -o example && ./example
#include "spac.h"

#include <stdio.h>
#include <stdlib.h>

enum { N_TOKENS = 2000, N_LAYERS = 4, N_EXPERTS = 32, N_USED = 4 };

// Experts that a token uses: mostly those of the current topic, which changes every 200 tokens; no expert twice.
static void route(uint16_t * ids, int token, int layer) {
    const int topic = token / 200 * 7 + layer;
    int n = 0;
    while (n < N_USED) {
        const int expert = rand() % 4 != 0 ? (topic + rand() % 8) % N_EXPERTS : rand() % N_EXPERTS;
        int seen = 0;
        for (int i = 0; i < n; ++i) {
            seen |= ids[i] == expert;
        }
        if (!seen) {
            ids[n++] = (uint16_t) expert;
        }
    }
}

int main(void) {
    if (spac_abi_version() != SPAC_ABI_VERSION || spac_struct_size(SPAC_STRUCT_SIMULATION) != sizeof(spac_simulation)) {
        fprintf(stderr, "libspac has ABI %d, this program was compiled for %d\n", spac_abi_version(), SPAC_ABI_VERSION);
        return 1;
    }
    static uint16_t ids[N_TOKENS][N_LAYERS][N_USED];
    for (int token = 0; token < N_TOKENS; ++token) {
        for (int layer = 0; layer < N_LAYERS; ++layer) {
            route(ids[token][layer], token, layer);
        }
    }
    const uint64_t bundle_bytes[N_LAYERS] = { 1 << 20, 1 << 20, 1 << 20, 1 << 20 };
    const struct {
        const char * name;
        int          policy;
    } policies[] = { { "spac", SPAC_POLICY_DEFAULT }, { "LRU", SPAC_POLICY_LRU }, { "LFU", SPAC_POLICY_LFU }, { "best possible", SPAC_POLICY_MIN } };

    printf("%d tokens, a quarter of %d experts in each of %d layers has room\n", N_TOKENS, N_EXPERTS, N_LAYERS);
    for (size_t i = 0; i < sizeof policies / sizeof policies[0]; ++i) {
        spac_simulation s = { 0 };
        s.struct_size  = sizeof s;
        s.ids          = &ids[0][0][0];
        s.bundle_bytes = bundle_bytes;
        s.n_tokens     = N_TOKENS;
        s.n_bundles    = N_LAYERS * N_EXPERTS / 4;
        s.n_layers     = N_LAYERS;
        s.n_experts    = N_EXPERTS;
        s.n_used       = N_USED;
        s.policy       = policies[i].policy;
        if (spac_simulate(&s) != SPAC_OK) {
            fprintf(stderr, "%s\n", spac_last_error());
            return 1;
        }
        printf("%-14s %5.1f %% hits, %4llu MiB read\n", policies[i].name, 100.0 * s.hits / (s.hits + s.misses),
               (unsigned long long) (s.bytes >> 20));
    }

    spac_info info = { 0 };
    info.struct_size = sizeof info;
    if (spac_model_info(1, &info) != SPAC_OK) {  // none is loaded
        printf("an error reads: %s\n", spac_last_error());
    }
    return 0;
}
