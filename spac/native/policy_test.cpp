#include "policy.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>

using namespace spac;

static constexpr auto anything = [](int, int) { return true; };

static void use(Policy & policy, int layer, std::vector<int32_t> experts) {
    policy.begin(layer);
    policy.use(layer, experts.data(), (int) experts.size());
    policy.end_turn(layer);
}

TEST_CASE("a bundle that was never used is worth less than one that was") {
    Policy policy({ 8 });
    use(policy, 0, { 3 });
    for (int e = 0; e < 8; ++e) {
        CHECK((e == 3 || policy.worth(0, e) < policy.worth(0, 3)));
    }
}

TEST_CASE("of bundles last used by the same token, the one that is used more often is worth more") {
    Policy policy({ 8 });
    for (int i = 0; i < 4; ++i) {
        use(policy, 0, { 1 });
    }
    use(policy, 0, { 1, 2 });
    CHECK(policy.worth(0, 1) > policy.worth(0, 2));
}

TEST_CASE("of bundles used equally often, the one used last is worth more") {
    Policy policy({ 8 });
    use(policy, 0, { 1 });
    use(policy, 0, { 2 });
    CHECK(policy.worth(0, 2) > policy.worth(0, 1));
}

TEST_CASE("old frequency gives way to a new use") {
    Policy policy({ 8 });
    for (int i = 0; i < 20; ++i) {
        use(policy, 0, { 1 });
    }
    for (int i = 0; i < 600; ++i) {
        use(policy, 0, { 2 });
    }
    use(policy, 0, { 3 });
    CHECK(policy.worth(0, 3) > policy.worth(0, 1));
}

TEST_CASE("a layer whose turn is near is worth more than one just computed, in a circle") {
    Policy policy({ 4, 4, 4 });
    for (int token = 0; token < 20; ++token) {
        for (int layer = 0; layer < 3; ++layer) {
            use(policy, layer, { 0 });
        }
    }
    CHECK(policy.worth(0, 0) > policy.worth(1, 0));
    CHECK(policy.worth(1, 0) > policy.worth(2, 0));
    policy.begin(0);
    CHECK(policy.worth(1, 0) > policy.worth(2, 0));
    CHECK(policy.worth(2, 0) > policy.worth(0, 0));
    CHECK(policy.value(0, 0) == doctest::Approx(policy.worth(0, 0)));
}

TEST_CASE("values approach what bundles are really used, whatever the first guess") {
    // each token uses what the token before it did not: the guess that things go on as they went is wrong
    Policy policy({ 2 });
    for (int token = 0; token < 60000; ++token) {
        use(policy, 0, { token % 2 });
    }
    // 1 was last, so 0 is used by the next token and every second one after it; a token later counts a quarter
    CHECK(policy.value(0, 0) == doctest::Approx(1 / (1 - 0.25 * 0.25)).epsilon(0.02));
    CHECK(policy.value(0, 1) == doctest::Approx(0.25 / (1 - 0.25 * 0.25)).epsilon(0.02));
}

TEST_CASE("a forecast counts until the layer's next token, and only upwards") {
    Policy policy({ 4 });
    use(policy, 0, { 1 });
    const double before = policy.value(0, 1);
    policy.expect(0, 2, 0.75);
    policy.expect(0, 1, 0);
    CHECK(policy.value(0, 2) == doctest::Approx(0.75));
    CHECK(policy.value(0, 1) == before);
    use(policy, 0, { 1 });
    CHECK(policy.value(0, 2) < 0.75);
}

TEST_CASE("what is foreseen counts for two turns, then the policy's own value again") {
    Policy policy({ 3 }), plain({ 3 });
    for (Policy * p : { &policy, &plain }) {
        use(*p, 0, { 0 });
        use(*p, 0, { 1 });
    }
    const float now[] = { 1, 0, 0.5f }, later[] = { 0.2f, 0.6f, 0.1f }, rest[] = { 0, 0.5f, 1 };
    policy.foresee(0, now, later, rest);
    const double step = Policy::step_discount;
    CHECK(policy.value(0, 0) == doctest::Approx(1));
    CHECK(policy.value(0, 1) == doctest::Approx(step * (0.6 + 0.5 * plain.value(0, 1))));
    CHECK(policy.value(0, 2) == doctest::Approx(0.5 + 0.5 * step * 0.1));  // never used: no value of its own
    use(policy, 0, { 0 });
    use(plain, 0, { 0 });
    CHECK(policy.value(0, 0) == doctest::Approx(0.2));
    CHECK(policy.value(0, 1) == doctest::Approx(0.6 + 0.5 * plain.value(0, 1)));
    use(policy, 0, { 2 });
    use(plain, 0, { 2 });
    for (int e = 0; e < 3; ++e) {
        CHECK(policy.value(0, e) == plain.value(0, e));
    }
}

TEST_CASE("a ubatch of several tokens is one turn") {
    Policy policy({ 2 });
    const float now[] = { 0, 0 }, later[] = { 0.25f, 0.75f }, rest[] = { 0, 0 };
    policy.foresee(0, now, later, rest);
    policy.use_ubatch(0, { 0, 1 }, 2, 1, [](int64_t token, int) { return (int32_t) token; });
    CHECK(policy.value(0, 1) == doctest::Approx(0.75));
}

TEST_CASE("numbers that are no expert's are ignored") {
    Policy policy({ 4 }), other({ 4 });
    use(policy, 0, { -1, 2, 4, 70000 });
    use(other, 0, { 2 });
    for (int e = 0; e < 4; ++e) {
        CHECK(policy.value(0, e) == other.value(0, e));
    }
}

TEST_CASE("a long ubatch counts as its last tokens, what earlier ones used as one use before them") {
    constexpr int n = 200;
    std::vector<int32_t> ids(n);  // token t uses expert t % 64
    for (int t = 0; t < n; ++t) {
        ids[t] = t % 64;
    }
    std::vector<int32_t> experts(64);
    for (int e = 0; e < 64; ++e) {
        experts[e] = e;
    }
    Policy policy({ 64 }), other({ 64 });
    policy.use_ubatch(0, experts, n, 1, [&](int64_t token, int) { return ids[token]; });
    other.use(0, experts.data(), 64, false);
    for (int t = n - Policy::ubatch_tokens; t < n; ++t) {
        other.use(0, &ids[t], 1, t > n - Policy::ubatch_tokens);
    }
    other.end_turn(0);
    for (int e = 0; e < 64; ++e) {
        CHECK(policy.value(0, e) == other.value(0, e));
    }
}

TEST_CASE("the cheapest is what a search of everything present and admitted finds, after any history") {
    std::mt19937 random(1);
    for (int round = 0; round < 20; ++round) {
        const std::vector<int> sizes = { 5, 16, 9 };
        Policy policy(sizes);
        std::vector<std::vector<bool>> present(3, std::vector<bool>(16));
        for (int step = 0; step < 300; ++step) {
            const int layer = (int) (random() % 3), expert = (int) (random() % (unsigned) sizes[layer]);
            switch (random() % 4) {
                case 0: policy.set_present(layer, expert, present[layer][expert] = !present[layer][expert]); break;
                case 1: policy.expect(layer, expert, 0.5); break;
                case 2: policy.begin(layer); break;
                default: use(policy, layer, { expert, (int) (random() % (unsigned) sizes[layer]) });
            }
            const auto admitted = [](int, int e) { return e % 3 != 1; };
            Policy::Victim expected;
            for (int l = 0; l < 3; ++l) {
                for (int e = 0; e < sizes[l]; ++e) {
                    if (present[l][e] && admitted(l, e) && policy.worth(l, e) < expected.worth) {
                        expected = { l, e, policy.worth(l, e) };
                    }
                }
            }
            const Policy::Victim found = policy.cheapest(admitted);
            CHECK(found.layer == expected.layer);
            CHECK(found.expert == expected.expert);
            const Policy::Victim of_layer = policy.cheapest(anything, 1);
            CHECK((of_layer.layer == 1 || std::none_of(present[1].begin(), present[1].end(), [](bool p) { return p; })));
        }
    }
}
