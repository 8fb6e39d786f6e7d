#include "policy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace spac {

namespace {

// Found on one half of a trace of gpt-oss-20b and on short runs of the bundled model, and checked on the other half; the optimum
// is flat: docs/benchmarks/policy.md.
constexpr double half_life_tokens = 32;
constexpr float  discount         = 0.25f;    // of a use a token later
constexpr float  prior_tokens     = 800;      // what the first guess about a cell weighs: with less, short runs suffer
constexpr float  remembered_tokens = 1 << 14;  // a cell that has seen more than this forgets, slowly
constexpr int    n_ages = 8, n_levels = 16, n_cells = n_ages * n_levels;
constexpr uint32_t never = UINT32_MAX;

const float decay = (float) std::exp2(-1 / half_life_tokens);

// Half octaves from 1 downwards: 15, 14 ... 0. A float's exponent and first mantissa bit count half octaves.
int level(float share) {
    uint32_t bits, one_bits;
    const float one = 1;
    std::memcpy(&bits, &share, sizeof bits);
    std::memcpy(&one_bits, &one, sizeof one_bits);
    const int below = (int) (one_bits >> 22) - (int) (bits >> 22);
    return std::min(n_levels - 1, std::max(0, n_levels - below));
}

float share_of(int level) { return (float) std::exp2((level - n_levels + 0.5) / 2); }

float decayed(float share) { return share < 1e-20f ? 0 : share * decay; }  // denormal floats are slow

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
    for (int i = 0; i < n_cells; ++i) {  // the first guess: it goes on as it went, a little less the longer it has not been used
        cells_[i] = { share_of(i % n_levels) * (float) std::exp2(-0.15 * (i / n_levels)) / (1 - discount), prior_tokens };
    }
    for (size_t distance = 1; distance <= layers_.size(); ++distance) {
        nearness_.push_back(std::sqrt((float) layers_.size() / (float) distance));
    }
    for (size_t i = 0; i < layers_.size(); ++i) {
        Layer & layer = layers_[i];
        const size_t n = (size_t) n_experts[i];
        layer.share.assign(n, 0);
        layer.idle_tokens.assign(n, never);
        layer.cell.assign(n, 0);
        layer.own.assign(n, 0);
        layer.value.assign(n, 0);
        layer.now.assign(n, 0);
        layer.later.assign(n, 0);
        layer.rest.assign(n, 0);
        layer.present.assign(n, 0);
        layer.used.assign(n, 0);
        for (size_t e = 0; e < n; ++e) {
            place(layer, e);
        }
    }
}

void Policy::place(Layer & layer, size_t e) {
    if (layer.idle_tokens[e] == never) {  // nothing is known of it, and it teaches nothing about others
        layer.cell[e] = n_cells;
        layer.own[e]  = 0;
        return;
    }
    const int cell = age_of(layer.idle_tokens[e]) * n_levels + level(layer.share[e]);
    layer.cell[e] = (uint16_t) cell;
    // within a cell the more frequent one is worth a little more
    layer.own[e]  = cells_[cell].value + layer.share[e] / 1024;
}

void Policy::appraise(Layer & layer) {
    for (size_t e = 0; e < layer.value.size(); ++e) {
        const float after = layer.foreseen > 0 ? layer.later[e] + layer.rest[e] * layer.own[e] : layer.own[e];
        layer.value[e] = layer.foreseen > 1 ? layer.now[e] + (1 - layer.now[e]) * step_discount * after : after;
    }
    layer.least = -1;
}

void Policy::use(int index, const int32_t * experts, int n_used, bool learn) {
    Layer & layer = layers_[index];
    const size_t n = layer.value.size();
    for (int i = 0; i < n_used; ++i) {
        if (experts[i] >= 0 && (size_t) experts[i] < n) {
            layer.used[experts[i]] = 1;
        }
    }
    for (size_t e = 0; e < n; ++e) {
        const bool used = layer.used[e];
        const int  before = layer.cell[e];
        layer.share[e]       = decayed(layer.share[e]) + (used ? 1 - decay : 0);
        layer.idle_tokens[e] = used ? 0 : layer.idle_tokens[e] + (layer.idle_tokens[e] < never - 1);
        layer.used[e]        = 0;
        place(layer, e);
        if (learn && before != n_cells) {
            Cell & cell = cells_[before];
            cell.tokens = std::min(cell.tokens + 1, remembered_tokens);
            cell.value += ((used ? 1 : 0) + discount * cells_[layer.cell[e]].value - cell.value) / cell.tokens;
        }
    }
}

void Policy::end_turn(int index) {
    Layer & layer = layers_[index];
    layer.foreseen = std::max(0, layer.foreseen - 1);
    appraise(layer);
}

void Policy::expect(int index, int expert, double chance) {
    Layer & layer = layers_[index];
    layer.value[expert] = std::max(layer.value[expert], (float) chance);
    layer.least = -1;
}

void Policy::foresee(int index, const float * now, const float * later, const float * rest) {
    Layer & layer = layers_[index];
    const size_t n = layer.value.size();
    std::copy(now, now + n, layer.now.begin());
    std::copy(later, later + n, layer.later.begin());
    std::copy(rest, rest + n, layer.rest.begin());
    layer.foreseen = 2;
    appraise(layer);
}

void Policy::set_present(int index, int expert, bool present) {
    Layer & layer = layers_[index];
    layer.present[expert] = present;
    layer.least = -1;
}

float Policy::least_present(Layer & layer) {
    if (layer.least < 0) {
        layer.least = std::numeric_limits<float>::infinity();
        for (size_t e = 0; e < layer.value.size(); ++e) {
            layer.least = layer.present[e] ? std::min(layer.least, layer.value[e]) : layer.least;
        }
    }
    return layer.least;
}

}  // namespace spac
