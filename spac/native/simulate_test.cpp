// Small replays: hand-counted ones, MIN against all others, and the pager against its own simulation.
#include "simulate.h"
#include "testing.h"

#include <random>

using namespace spac;
using namespace spac::testing;

namespace {

struct Replay {
    int n_layers, n_experts, n_used;
    std::vector<uint16_t> ids;
    std::vector<int32_t>  ubatch;

    uint64_t n_tokens() const { return ids.size() / (size_t) (n_layers * n_used); }
    spac_simulation run(int policy, uint64_t n_bundles, bool by_layer = false, std::vector<uint16_t> * misses = nullptr) const {
        const std::vector<uint64_t> bytes((size_t) n_layers, 10);
        spac_simulation s{};
        s.struct_size  = sizeof s;
        s.ids          = ids.data();
        s.ubatch       = ubatch.empty() ? nullptr : ubatch.data();
        s.bundle_bytes = bytes.data();
        s.n_tokens     = n_tokens();
        s.n_bundles    = n_bundles;
        s.n_layers     = n_layers;
        s.n_experts    = n_experts;
        s.n_used       = n_used;
        s.policy       = policy;
        s.by_layer     = by_layer;
        if (misses) {
            misses->assign(n_tokens() * (uint64_t) n_layers, 0);
            s.visit_misses = misses->data();
        }
        REQUIRE(spac_simulate(&s) == SPAC_OK);
        return s;
    }
};

// One layer, one expert a token.
Replay single(std::vector<uint16_t> ids, int n_experts = 8) {
    return { 1, n_experts, 1, std::move(ids), {} };
}

// Experts that are likely to be those of the token before, some more popular than others.
Replay habitual(int n_layers, int n_experts, int n_used, int n_tokens, unsigned seed) {
    std::mt19937 random(seed);
    Replay replay{ n_layers, n_experts, n_used, {}, {} };
    std::vector<std::vector<uint16_t>> last((size_t) n_layers);
    for (int t = 0; t < n_tokens; ++t) {
        for (auto & chosen : last) {
            std::vector<uint16_t> now;
            while ((int) now.size() < n_used) {
                const bool again = !chosen.empty() && random() % 2;
                const uint16_t e = again ? chosen[random() % chosen.size()] : (uint16_t) (std::min(random() % n_experts, random() % n_experts));
                if (std::find(now.begin(), now.end(), e) == now.end()) {
                    now.push_back(e);
                }
            }
            chosen = now;
            replay.ids.insert(replay.ids.end(), now.begin(), now.end());
        }
    }
    return replay;
}

constexpr int policies[] = { SPAC_POLICY_DEFAULT, SPAC_POLICY_LRU, SPAC_POLICY_LFU, SPAC_POLICY_STATIC, SPAC_POLICY_S3FIFO, SPAC_POLICY_MIN };

}  // namespace

TEST_CASE("least recently used leaves") {
    CHECK(single({ 0, 1, 0, 2, 0, 1 }).run(SPAC_POLICY_LRU, 2).hits == 2);     // 2 pushes out 1
    CHECK(single({ 0, 1, 2, 0, 1, 2 }).run(SPAC_POLICY_LRU, 2).hits == 0);
}

TEST_CASE("least often used leaves") {
    CHECK(single({ 0, 0, 1, 2, 0, 2, 1 }).run(SPAC_POLICY_LFU, 2).hits == 3);  // 0, 0 and 2
}

TEST_CASE("static keeps what the whole replay uses most") {
    CHECK(single({ 1, 2, 0, 1, 0, 1, 0, 1 }).run(SPAC_POLICY_STATIC, 2).misses == 3);
}

TEST_CASE("MIN keeps what comes next") {
    CHECK(single({ 0, 1, 2, 0, 1, 2 }).run(SPAC_POLICY_MIN, 2).hits == 2);
}

TEST_CASE("S3-FIFO lets what is used once pass and keeps what is used again") {
    std::vector<uint16_t> ids;
    for (int i = 0; i < 3; ++i) {
        ids.insert(ids.end(), { 0, 1, 2 });
    }
    for (uint16_t scan = 3; scan < 60; ++scan) {
        ids.push_back(scan);
    }
    const uint64_t before = single(ids, 64).run(SPAC_POLICY_S3FIFO, 10).hits;
    ids.insert(ids.end(), { 0, 1, 2 });
    CHECK(single(ids, 64).run(SPAC_POLICY_S3FIFO, 10).hits == before + 3);
    CHECK(single(ids, 64).run(SPAC_POLICY_LRU, 10).hits == before);
}

TEST_CASE("a token's experts do not push out one another, and what has no room passes through") {
    const Replay pairs{ 1, 8, 2, { 0, 1, 2, 3, 2, 3 }, {} };
    const Replay wide{ 1, 8, 4, { 0, 1, 2, 3, 0, 1, 2, 3 }, {} };
    for (int policy : policies) {
        CAPTURE(policy);
        CHECK(pairs.run(policy, 2).hits == 2);
        CHECK(wide.run(policy, 3).hits == 3);
    }
}

TEST_CASE("tokens of a ubatch are one use of each expert") {
    Replay replay = single({ 0, 1, 0, 0, 1 });
    replay.ubatch = { 7, 7, 7, 8, 8 };
    const spac_simulation s = replay.run(SPAC_POLICY_LRU, 4);
    CHECK(s.n_ubatches == 2);
    CHECK(s.hits == 2);
    CHECK(s.misses == 2);
    CHECK(s.bytes == 20);
}

TEST_CASE("one cache for all layers or one for each") {
    Replay replay{ 2, 4, 1, {}, {} };
    for (int i = 0; i < 12; ++i) {
        replay.ids.push_back((uint16_t) (i % 3));  // layer 0 needs three places, layer 1 one
        replay.ids.push_back(0);
    }
    CHECK(replay.run(SPAC_POLICY_LRU, 4).misses == 4);
    CHECK(replay.run(SPAC_POLICY_LRU, 4, true).misses == 13);
    CHECK(replay.run(SPAC_POLICY_LRU, 5, true).misses == 4);  // the odd place goes to the first layer
}

TEST_CASE("numbers from n_experts on are ignored") {
    CHECK(single({ 0, 9, 65535, 0 }, 8).run(SPAC_POLICY_LRU, 2).hits == 1);
}

TEST_CASE("what each visit missed adds up") {
    const Replay replay = habitual(3, 16, 2, 100, 5);
    std::vector<uint16_t> misses;
    const spac_simulation s = replay.run(SPAC_POLICY_DEFAULT, 12, false, &misses);
    uint64_t sum = 0;
    for (uint16_t m : misses) {
        sum += m;
    }
    CHECK(sum == s.misses);
    CHECK(s.hits + s.misses == 3 * 2 * 100);
}

TEST_CASE("nothing misses less than MIN, and no order misses what always fits") {
    for (unsigned seed = 0; seed < 5; ++seed) {
        const Replay replay = habitual(3, 16, 2, 300, seed);
        for (bool by_layer : { false, true }) {
            for (uint64_t n_bundles : { 9, 12, 24, 36 }) {
                const uint64_t least = replay.run(SPAC_POLICY_MIN, n_bundles, by_layer).misses;
                for (int policy : policies) {
                    CAPTURE(policy);
                    CHECK(replay.run(policy, n_bundles, by_layer).misses >= least);
                }
            }
            for (int policy : policies) {
                CHECK(replay.run(policy, 3 * 16, by_layer).misses == replay.run(SPAC_POLICY_MIN, 3 * 16, by_layer).misses);
            }
        }
    }
}

TEST_CASE("arguments that make no sense are refused") {
    spac_simulation s{};
    CHECK(spac_simulate(&s) == SPAC_E_ARGUMENT);
    CHECK(spac_simulate(nullptr) == SPAC_E_ARGUMENT);
    const uint16_t id = 0;
    const uint64_t bytes = 1;
    s = { sizeof s, &id, nullptr, &bytes, nullptr, nullptr, 1, 1, 1, 8, 1, SPAC_POLICY_MIN + 1, 0,
          0, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, 0, 0, 0, 0 };
    CHECK(spac_simulate(&s) == SPAC_E_ARGUMENT);
    s.policy = SPAC_POLICY_MIN;
    CHECK(spac_simulate(&s) == SPAC_OK);
    const uint64_t room = 2;
    s.layer_bundles = &room;
    CHECK(spac_simulate(&s) == SPAC_E_ARGUMENT);
    s.by_layer = 1;
    CHECK(spac_simulate(&s) == SPAC_E_ARGUMENT);  // another sum
    s.n_bundles = 2;
    CHECK(spac_simulate(&s) == SPAC_OK);
    s.n_bundles = 0;
    CHECK(spac_simulate(&s) == SPAC_E_ARGUMENT);
    s.n_bundles    = 2;
    s.ahead_layers = -1;
    CHECK(spac_simulate(&s) == SPAC_E_ARGUMENT);
}

TEST_CASE("what is expected is read while the disk is idle") {
    // two layers of four experts of 10 bytes, one a token: 0 then 1, and 2 then 3; the second token's are foreseen, and in layer 0 a wrong one
    const uint16_t ids[] = { 0, 1, 2, 3 };
    const uint64_t bytes[] = { 10, 10 };
    float          foresight[2][3][2][4] = {};
    foresight[0][0][0][0] = -1;
    foresight[1][0][0][2] = 0.95f;
    foresight[1][0][1][3] = 0.95f;
    double          wait[4], ahead[4], wasted[4];
    spac_simulation s{};
    s.struct_size       = sizeof s;
    s.ids               = ids;
    s.bundle_bytes      = bytes;
    s.foresight         = &foresight[0][0][0][0];
    s.n_tokens          = 2;
    s.n_bundles         = 4;
    s.n_layers          = 2;
    s.n_experts         = 4;
    s.n_used            = 1;
    s.ahead_layers      = 2;
    s.read_from         = 0.9;
    s.idle_bytes        = 12;
    s.visit_wait_bytes   = wait;
    s.visit_ahead_bytes  = ahead;
    s.visit_wasted_bytes = wasted;
    const auto check = [&](std::vector<double> waited, std::vector<double> read, std::vector<double> in_vain = { 0, 0, 0, 0 }) {
        REQUIRE(spac_simulate(&s) == SPAC_OK);
        CHECK(std::vector<double>(wait, wait + 4) == waited);
        CHECK(std::vector<double>(ahead, ahead + 4) == read);
        CHECK(std::vector<double>(wasted, wasted + 4) == in_vain);
    };
    check({ 10, 10, 0, 0 }, { 0, 0, 12, 8 });
    CHECK(s.misses == 2);
    s.ahead_layers = 1;  // layer 1's turn to be read begins when layer 0 is done
    check({ 10, 10, 0, 0 }, { 0, 0, 10, 10 });
    s.idle_bytes = 4;    // it comes too late for the rest
    check({ 10, 10, 6, 6 }, { 0, 0, 4, 4 });
    CHECK(s.misses == 4);
    s.idle_use_bytes = 3;  // of layer 0's expert: its own demand was longer, so the disk was not idle
    check({ 10, 10, 6, 6 }, { 0, 0, 4, 4 });
    s.idle_use_bytes = 9;
    check({ 10, 10, 6, 3 }, { 0, 0, 4, 7 });
    s.read_from = 0.96;
    check({ 10, 10, 10, 10 }, { 0, 0, 0, 0 });

    s.read_from           = 0.9;
    foresight[1][0][0][2] = 0;
    foresight[1][0][0][3] = 0.95f;  // a wrong guess: what was read of it is lost, and the demand waits for the piece in flight
    s.idle_use_bytes      = 0;
    s.ahead_layers        = 1;
    check({ 10, 10, 20, 6 }, { 0, 0, 4, 4 }, { 0, 0, 4, 0 });
    s.n_bundles    = 1;  // what is there, layer 1's 1, is pushed out only by what is worth more
    s.ahead_layers = 2;
    foresight[1][0][0][3] = 0;
    for (float chance : { 0.5f, 1.0f }) {
        foresight[1][0][1][1] = chance;
        REQUIRE(spac_simulate(&s) == SPAC_OK);
        CHECK(ahead[2] == (chance < 1 ? 4 : 0));
    }
}

TEST_CASE("the pager has exactly the hits and misses of its simulation") {
    for (int n_parts : { 1, 3 }) {
        for (uint64_t n_bundles : { 16, 20, 30 }) {
            const Shape  shape{ 3, n_parts, 16, page_size() };
            const Replay replay = habitual(shape.n_layers, shape.n_experts, 2, 150, 11);
            std::vector<uint16_t> misses;
            const spac_simulation s = replay.run(SPAC_POLICY_DEFAULT, n_bundles, false, &misses);

            TestModel m(shape);
            Pager     pager(n_bundles * (uint64_t) n_parts * shape.slice_bytes);
            pager.add_model(m.model, 0);
            Context context(pager);
            bool    same = true;
            for (size_t t = 0; t < replay.n_tokens(); ++t) {
                for (int layer = 0; layer < shape.n_layers; ++layer) {
                    const uint64_t before = m.model->misses;
                    const uint16_t * ids  = &replay.ids[(t * shape.n_layers + layer) * 2];
                    for (PagedTensor * tensor : m.model->groups[layer]->parts) {
                        Walk walk = begin(pager, *tensor, &context, { { ids[0], ids[1] } });
                        for (int e : walk.order) {
                            use(pager, m, *walk.op, e);
                        }
                    }
                    same = same && m.model->misses - before == misses[t * shape.n_layers + layer];
                }
            }
            CAPTURE(n_parts);
            CAPTURE(n_bundles);
            CHECK(same);
            CHECK(m.model->hits == s.hits);
            CHECK(m.model->misses == s.misses);
            CHECK(m.model->reads == s.misses * (uint64_t) n_parts);
        }
    }
}
