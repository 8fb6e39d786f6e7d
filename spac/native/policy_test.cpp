#include "policy.h"

#include <doctest/doctest.h>

#include <random>
#include <vector>

using namespace spac;

static double score_of(const std::vector<double> & times) {
    double score = Policy::never;
    for (double t : times) {
        score = Policy::use(score, t);
    }
    return score;
}

TEST_CASE("a bundle that was never used is worth less than any use") {
    CHECK(Policy::never < Policy::worth(0, 1e-30));
    CHECK(Policy::use(Policy::never, 5) == doctest::Approx(Policy::worth(5)));
}

TEST_CASE("a use counts half as much a half-life later") {
    CHECK(Policy::worth(100, 0.5) == doctest::Approx(Policy::worth(100 - Policy::half_life_tokens)));
    CHECK(score_of({ 0, 0 }) == doctest::Approx(Policy::worth(Policy::half_life_tokens)));
}

TEST_CASE("of bundles last used at about the same time, the one that is used more often is worth more") {
    CHECK(score_of({ 0, 2, 4, 6, 8 }) > score_of({ 9 }));
}

TEST_CASE("of bundles used equally often, the one used last is worth more") {
    CHECK(score_of({ 0, 1, 6 }) > score_of({ 0, 1, 5 }));
}

TEST_CASE("old frequency gives way to a new use") {
    CHECK(score_of({ 0, 1, 2, 3, 4, 5, 6, 7 }) < score_of({ 200 }));
}

TEST_CASE("scores order bundles as sums of decayed uses do, also after millions of tokens") {
    std::mt19937 random(1);
    for (double start : { 0.0, 5e6 }) {
        const double now = start + 200;
        double last_sum = 0, last_score = Policy::never;
        for (int bundle = 0; bundle < 200; ++bundle) {
            std::vector<double> times(1 + random() % 30);
            double sum = 0;
            for (double & t : times) {
                t = start + random() % 200;
                sum += std::exp2((t - now) / Policy::half_life_tokens);
            }
            const double score = score_of(times);  // in no order of time: contexts interleave
            CHECK(score - Policy::worth(now) == doctest::Approx(std::log2(sum)).epsilon(1e-6));
            if (std::abs(sum - last_sum) > 1e-6) {
                CHECK((score > last_score) == (sum > last_sum));
            }
            last_sum   = sum;
            last_score = score;
        }
    }
}
