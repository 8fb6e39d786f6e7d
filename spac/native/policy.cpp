#include "policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace spac {

namespace {

// Found on one half of a trace of gpt-oss-20b and checked on the other; the optimum is flat: docs/benchmarks/policy.md.
constexpr double recent_half_life_tokens = 8, steady_half_life_tokens = 128;
constexpr int      n_ages = 8, n_levels = 16, n_cells = n_ages * n_levels * n_levels;
constexpr uint32_t never = UINT32_MAX;
constexpr float    prior_tokens = 1024;          // what the first guess about a cell weighs: with less, short runs suffer
constexpr float    remembered_tokens = 1 << 16;  // a cell that has seen more than this forgets half

const float recent_decay = (float) std::exp2(-1 / recent_half_life_tokens), recent_share = 1 - recent_decay;
const float steady_decay = (float) std::exp2(-1 / steady_half_life_tokens), steady_share = 1 - steady_decay;

// Half octaves from 1 downwards: 15, 14 ... 0. A float's exponent and first mantissa bit count half octaves.
int level(float share) {
    uint32_t bits, one_bits;
    const float one = 1;
    std::memcpy(&bits, &share, sizeof bits);
    std::memcpy(&one_bits, &one, sizeof one_bits);
    const int below = (int) (one_bits >> 22) - (int) (bits >> 22);
    return std::min(n_levels - 1, std::max(0, n_levels - below));
}

float share_of(int level) { return level > 0 ? (float) std::exp2((level - n_levels + 0.5) / 2) : 0; }

float decayed(float share, float decay) { return share < 1e-20f ? 0 : share * decay; }  // denormal floats are slow

int age_of(uint32_t idle_tokens) {  // 0: used by the last token; then octaves
    int octave = 0;
    while (idle_tokens > 0 && octave < n_ages - 1) {
        idle_tokens >>= 1;
        ++octave;
    }
    return octave;
}

}  // namespace

Policy::Policy(const std::vector<int> & n_experts) : layers_(n_experts.size()), cells_(n_cells + 1) {
    for (int i = 0; i < n_cells; ++i) {  // the first guess: it goes on as it went, less the longer it has not been used
        const int steady = i % n_levels, recent = i / n_levels % n_levels, age = i / (n_levels * n_levels);
        const float guess = std::sqrt((share_of(recent) + share_of(steady)) / 2) * (float) std::exp2(-age / 2.0);
        cells_[i] = { guess * prior_tokens, prior_tokens };
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
        Layer & layer = layers_[i];
        const size_t n = (size_t) n_experts[i];
        layer.recent.assign(n, 0);
        layer.steady.assign(n, 0);
        layer.idle_tokens.assign(n, never);
        layer.cell.assign(n, 0);
        layer.chance.assign(n, 0);
        layer.present.assign(n, 0);
        layer.used.assign(n, 0);
        for (size_t e = 0; e < n; ++e) {
            place(layer, e);
        }
    }
}

void Policy::place(Layer & layer, size_t e) {
    if (layer.idle_tokens[e] == never) {  // nothing is known of it, and it teaches nothing about others
        layer.cell[e]   = n_cells;
        layer.chance[e] = 0;
        return;
    }
    const int cell = (age_of(layer.idle_tokens[e]) * n_levels + level(layer.recent[e])) * n_levels + level(layer.steady[e]);
    layer.cell[e] = (uint16_t) cell;
    // within a cell the more frequent one is worth a little more
    layer.chance[e] = cells_[cell].uses / cells_[cell].tokens + layer.steady[e] / 1024;
}

void Policy::use(int index, const int32_t * experts, int n_used, bool learn) {
    Layer & layer = layers_[index];
    const size_t n = layer.chance.size();
    for (int i = 0; i < n_used; ++i) {
        if (experts[i] >= 0 && (size_t) experts[i] < n) {
            layer.used[experts[i]] = 1;
        }
    }
    for (size_t e = 0; learn && e < n; ++e) {
        Cell & cell = cells_[layer.cell[e]];
        cell.uses += layer.used[e];
        cell.tokens += 1;
        if (cell.tokens > remembered_tokens) {
            cell.uses /= 2;
            cell.tokens /= 2;
        }
    }
    for (size_t e = 0; e < n; ++e) {
        const bool used = layer.used[e];
        layer.recent[e]      = decayed(layer.recent[e], recent_decay) + (used ? recent_share : 0);
        layer.steady[e]      = decayed(layer.steady[e], steady_decay) + (used ? steady_share : 0);
        layer.idle_tokens[e] = used ? 0 : layer.idle_tokens[e] + (layer.idle_tokens[e] < never - 1);
        layer.used[e]        = 0;
        place(layer, e);
    }
    layer.least = -1;
}

void Policy::expect(int index, int expert, double chance) {
    Layer & layer = layers_[index];
    layer.chance[expert] = std::max(layer.chance[expert], (float) chance);
    layer.least = -1;
}

void Policy::set_present(int index, int expert, bool present) {
    Layer & layer = layers_[index];
    layer.present[expert] = present;
    layer.least = -1;
}

float Policy::least_present(Layer & layer) {
    if (layer.least < 0) {
        layer.least = std::numeric_limits<float>::infinity();
        for (size_t e = 0; e < layer.chance.size(); ++e) {
            layer.least = layer.present[e] ? std::min(layer.least, layer.chance[e]) : layer.least;
        }
    }
    return layer.least;
}

}  // namespace spac
