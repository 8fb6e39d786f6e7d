// The one utility order: what a bundle is worth, for eviction and for prefetch alike.
//
// A bundle's score is its frequency of use, decayed exponentially with a half-life in tokens: combined recency and
// frequency (LRFU: Lee et al., IEEE Trans. Computers 50(12), 2001). It is kept as log2 of the sum of 2^(t/half_life) over
// the times t of its uses, which orders bundles as the decayed sum does and needs no update while time passes.
#pragma once

#include <cmath>

namespace spac {

struct Policy {
    static constexpr double half_life_tokens = 16.0;
    static constexpr double never            = -1e300;  // the score of a bundle not used yet
    // Of a ubatch only the last tokens say what comes next: a long prompt counts no more than this many decoded tokens.
    static constexpr int ubatch_tokens = 32;

    // A use that is expected with this weight (1: certain) at time t, in tokens.
    static double worth(double t, double weight = 1.0) { return t / half_life_tokens + std::log2(weight); }

    // Adds a use at time t to a score.
    static double use(double score, double t) {
        const double now = worth(t), high = now > score ? now : score, low = now > score ? score : now;
        return high + std::log2(1.0 + std::exp2(low - high));
    }
};

}  // namespace spac
