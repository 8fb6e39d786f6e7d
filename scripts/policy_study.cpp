// Eviction orders that were tried on a trace before one was chosen; scripts/policy_study.py builds and feeds it.
//
//   policy_study TRACE.raw    # int32 tokens, layers, experts, k; uint16 ids; float weights, [tokens][layers][k] each
//
// Prints a line of misses for each order and cache. All evict the bundle of least score, in one cache for all layers or in one
// for each; k experts of a token are asked for at once and do not push out one another.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

struct Trace {
    int32_t n, layers, experts, k;
    std::vector<uint16_t> ids;
    std::vector<float> weights;
    const uint16_t * at(int t, int l) const { return &ids[((size_t) t * layers + l) * k]; }
    const float * weight(int t, int l) const { return &weights[((size_t) t * layers + l) * k]; }
};

struct Order {
    bool  global = true, learned = false;
    std::vector<std::pair<double, double>> half_lives;  // tokens, share in the score
    double phase  = 0;     // the score is divided by the layers until the next turn, to this power
    double router = 0;     // a use counts as the router's weight to this power
    bool   ranked = false; // a use counts by its place in the top k
    double recency = 0;    // FlashMoE: share of recency, the rest is frequency since the start
    int    by_layer_table = 0;  // learned: one table for each layer
    bool   ages = true;    // learned: tokens since the last use are a feature
    double discount = 0;   // learned: of a use a token later
    bool   guess = false;  // learned: the first guess is the share of tokens, held for a while
    double age_power = 0;  // not learned: the score is divided by 2^(octaves since the last use times this)
};

static int octave(int x) { int o = 0; while (x > 0 && o < 7) { x >>= 1; ++o; } return o; }

static long run(const Trace & t, int per_layer, const Order & o) {
    const int L = t.layers, E = t.experts, B = L * E, J = (int) o.half_lives.size(), levels = 16, capacity = o.global ? per_layer * L : per_layer;
    std::vector<float> decay(J), counts((size_t) B * J, 0), chance(B, 0), seen(B, 0);
    std::vector<int> last(B, -1), cell(B, -1), slot(B, -1);
    std::vector<std::vector<int>> present(o.global ? 1 : L);
    int cells = o.ages ? 8 : 1;
    for (int j = 0; j < J; ++j) { decay[j] = std::exp2(-1 / o.half_lives[j].first); cells *= levels; }
    std::vector<double> uses((size_t) cells * (o.by_layer_table ? L : 1), 0.1), tokens(uses.size(), 4);
    for (int i = 0; o.guess && i < (int) uses.size(); ++i) {
        double share = 0;
        for (int j = J - 1, rest = i; j >= 0; --j, rest /= levels) { share += std::exp2((rest % levels - levels + 0.5) / 2) * o.half_lives[j].second; }
        tokens[i] = 800;
        uses[i]   = 800 * share / (1 - o.discount);
    }
    std::vector<float> near(L);
    for (int d = 0; d < L; ++d) { near[d] = std::pow((double) L / (d + 1), o.phase); }
    long misses = 0;
    for (int now = 0; now < t.n; ++now) {
        for (int l = 0; l < L; ++l) {
            std::vector<float> use(E, 0);
            std::vector<int> missed;
            for (int i = 0; i < t.k; ++i) {
                const int e = t.at(now, l)[i];
                use[e] = o.ranked ? 1.3f - 0.6f * i / (t.k - 1) : o.router > 0 ? std::pow(t.weight(now, l)[i] * t.k, o.router) : 1;
                if (slot[l * E + e] < 0) { missed.push_back(l * E + e); }
            }
            misses += (long) missed.size();
            const size_t table = o.by_layer_table ? (size_t) l * cells : 0;
            for (int e = 0; e < E; ++e) {
                const int b = l * E + e;
                const int before = cell[b];
                if (use[e] > 0) { last[b] = now; seen[b] += 1; }
                float score = 0;
                int c = o.ages ? octave(now - last[b]) : 0;
                for (int j = 0; j < J; ++j) {
                    float & count = counts[(size_t) b * J + j];
                    count = count < 1e-20f ? use[e] * (1 - decay[j]) : count * decay[j] + use[e] * (1 - decay[j]);
                    score += o.half_lives[j].second * count;
                    c = c * levels + (count > 0 ? std::clamp((int) (levels - 1 + std::floor(2 * std::log2(count))), 0, levels - 1) : 0);
                }
                if (o.recency > 0) { score = o.recency / (1 + now - last[b]) + (1 - o.recency) * seen[b] / (now + 1); }
                cell[b] = last[b] < 0 ? -1 : c;
                if (o.learned && before >= 0) {
                    tokens[table + before] += 1;
                    uses[table + before] += (use[e] > 0) + o.discount * uses[table + c] / tokens[table + c];
                }
                chance[b] = last[b] < 0 ? 0 : !o.learned ? score / std::exp2(o.age_power * octave(now - last[b]))
                                                          : uses[table + c] / tokens[table + c] + score / 1024;
            }
            auto & here = present[o.global ? 0 : l];
            for (int b : missed) {
                int at = (int) here.size();
                if (at < capacity) { here.push_back(b); slot[b] = at; continue; }
                float least = 1e30f;
                at = -1;
                for (int i = 0; i < (int) here.size(); ++i) {
                    const int v = here[i];
                    const float score = chance[v] * near[(v / E - l - 1 + L) % L];
                    if (score < least && !(v / E == l && use[v % E] > 0)) { least = score; at = i; }
                }
                slot[here[at]] = -1;
                here[at] = b;
                slot[b] = at;
            }
        }
    }
    return misses;
}

int main(int, char ** argv) {
    Trace t;
    FILE * file = std::fopen(argv[1], "rb");
    if (!file || std::fread(&t.n, 4, 4, file) != 4) { return 1; }
    t.ids.resize((size_t) t.n * t.layers * t.k);
    t.weights.resize(t.ids.size());
    if (std::fread(t.ids.data(), 2, t.ids.size(), file) != t.ids.size() || std::fread(t.weights.data(), 4, t.ids.size(), file) != t.ids.size()) { return 1; }
    std::vector<std::pair<std::string, Order>> orders;
    const auto add = [&](const std::string & name, const std::function<void(Order &)> & set) {
        for (bool global : { false, true }) {
            Order o;
            o.global = global;
            set(o);
            orders.emplace_back(name, o);
        }
    };
    for (double h : { 4., 16., 64., 256. }) { add("decayed frequency, half-life " + std::to_string((int) h), [&](Order & o) { o.half_lives = { { h, 1 } }; }); }
    add("the same, 16, times router's weight^0.5", [](Order & o) { o.half_lives = { { 16, 1 } }; o.router = 0.5; });
    add("the same, 16, times place in the top k", [](Order & o) { o.half_lives = { { 16, 1 } }; o.ranked = true; });
    add("sum of half-lives 8 and 128", [](Order & o) { o.half_lives = { { 8, .5 }, { 128, .5 } }; });
    add("sum of half-lives 4, 16 and 256", [](Order & o) { o.half_lives = { { 4, 1 }, { 16, 1 }, { 256, 1 } }; });
    add("recency + frequency (FlashMoE's features), 0.3 + 0.7", [](Order & o) { o.recency = 0.3; });
    const std::vector<std::pair<double, double>> both = { { 8, .5 }, { 128, .5 } };
    add("8 and 128, by next turn", [&](Order & o) { o.half_lives = both; o.phase = 1; });
    add("8 and 128, by age^0.5, by next turn", [&](Order & o) { o.half_lives = both; o.phase = 1; o.age_power = 0.5; });
    add("learned: 8, 128", [&](Order & o) { o.half_lives = both; o.learned = true; o.ages = false; o.phase = 1; });
    add("learned: age", [&](Order & o) { o.learned = true; o.phase = 1; });
    add("learned: age, 32", [&](Order & o) { o.half_lives = { { 32, 1 } }; o.learned = true; o.phase = 1; });
    add("learned: age, 8, 128; any turn", [&](Order & o) { o.half_lives = both; o.learned = true; });
    add("learned: age, 8, 128; a table by layer", [&](Order & o) { o.half_lives = both; o.learned = true; o.phase = 1; o.by_layer_table = 1; });
    add("learned: age, 8, 128; router's weight^0.5", [&](Order & o) { o.half_lives = both; o.learned = true; o.phase = 1; o.router = 0.5; });
    add("learned: age, 4, 64", [&](Order & o) { o.half_lives = { { 4, .5 }, { 64, .5 } }; o.learned = true; o.phase = 1; });
    add("learned: age, 16, 256", [&](Order & o) { o.half_lives = { { 16, .5 }, { 256, .5 } }; o.learned = true; o.phase = 1; });
    add("learned: age, 8, 128", [&](Order & o) { o.half_lives = both; o.learned = true; o.phase = 1; });
    for (double discount : { 0., 0.25, 0.5, 0.8 }) {
        add("learned: age, 32; guess, discount " + std::to_string(discount).substr(0, 4), [&](Order & o) {
            o.half_lives = { { 32, 1 } }; o.learned = o.guess = true; o.phase = 0.5; o.discount = discount; });
    }
    for (double phase : { 0., 0.25, 1. }) {
        add("the same, discount 0.25, by next turn^" + std::to_string(phase).substr(0, 4), [&](Order & o) {
            o.half_lives = { { 32, 1 } }; o.learned = o.guess = true; o.phase = phase; o.discount = 0.25; });
    }
    for (const auto & [name, order] : orders) {
        std::printf("%s\t%s", name.c_str(), order.global ? "global" : "layer");
        for (int quarter : { 1, 2, 3 }) { std::printf("\t%ld", run(t, quarter * t.experts / 4, order)); }
        std::printf("\n");
        std::fflush(stdout);
    }
}
