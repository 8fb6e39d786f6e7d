// What the policy costs on the pager's path, with 48 layers of 128 experts, 8 used, room for a quarter of them.
//
//   g++ -O3 -std=c++17 -Ispac/native -o build/policy_cost scripts/policy_cost.cpp spac/native/policy.cpp && build/policy_cost

#include "policy.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>

static double now_ns() { return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int main() {
    constexpr int n_layers = 48, n_experts = 128, n_used = 8, capacity = n_layers * n_experts / 4;
    std::mt19937 random(1);
    spac::Policy policy(std::vector<int>(n_layers, n_experts));
    std::vector<bool> present(n_layers * n_experts);
    int    held = 0, n_evictions = 0;
    double use_ns = 0, evict_ns = 0;
    for (int token = 0; token < 400; ++token) {
        for (int layer = 0; layer < n_layers; ++layer) {
            int32_t experts[n_used];  // three quarters are habits that change every 20 tokens
            for (int i = 0; i < n_used; ++i) {
                experts[i] = random() % 4 ? (layer * 7 + i * 5 + token / 20 * 3) % n_experts : (int) (random() % n_experts);
            }
            const double begin = now_ns();
            policy.begin(layer);
            policy.use(layer, experts, n_used);
            use_ns += now_ns() - begin;
            const auto evictable = [&](int l, int e) { return l != layer || std::find(experts, experts + n_used, e) == experts + n_used; };
            for (int32_t e : experts) {
                if (present[layer * n_experts + e]) {
                    continue;
                }
                if (held == capacity) {
                    const double search = now_ns();
                    const spac::Policy::Victim victim = policy.cheapest(evictable);
                    evict_ns += now_ns() - search;
                    ++n_evictions;
                    policy.set_present(victim.layer, victim.expert, false);
                    present[victim.layer * n_experts + victim.expert] = false;
                    --held;
                }
                policy.set_present(layer, e, true);
                present[layer * n_experts + e] = true;
                ++held;
            }
        }
    }
    std::printf("a token's uses in a layer, learning included: %.1f us; a victim: %.1f us\n", use_ns / (400 * n_layers) / 1e3, evict_ns / n_evictions / 1e3);
}
