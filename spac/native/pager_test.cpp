#include "testing.h"

using namespace spac;
using namespace spac::testing;

static constexpr uint64_t plenty = 1ull << 30;

// Budgets of models of the default shape, in whole slices.
static uint64_t slices(int n) {
    return (uint64_t) n * 2 * page_size();
}

static spac_error taken(Pager & pager, spac_context & context) {
    spac_error error{};
    error.struct_size = sizeof error;
    pager.take_error(context, error);
    return error;
}

static void wait_for_budget(const Pager & pager, uint64_t bytes) {
    while (pager.budget() != bytes) {
        std::this_thread::yield();
    }
}

//
// what is counted
//

TEST_CASE("a use is a hit if its whole bundle is resident when the layer begins, else a miss") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    pass(pager, m, nullptr, { { 0, 1 } });
    CHECK(m.model->misses == 4);
    pass(pager, m, nullptr, { { 1, 2 }, { 0, 1 } });  // an expert in one layer in one ubatch is one use
    CHECK(m.model->hits == 4);
    CHECK(m.model->misses == 6);

    m.prefetch(pager, 1, 5);
    REQUIRE(read_one(pager));  // one of two slices
    begin(pager, m.tensor(1, 0), nullptr, { { 5 } });
    CHECK(m.model->misses == 7);
    CHECK(m.model->groups[0]->hits == 2);
    CHECK(m.model->groups[0]->misses == 3);
    CHECK(m.model->groups[1]->misses == 4);
}

TEST_CASE("slices and bytes are counted as they are read, and once more when they are read again") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    pass(pager, m, nullptr, { { 0, 1 } });
    CHECK(m.model->reads == 8);
    CHECK(m.model->bytes_read == slices(8));
    CHECK(m.model->rereads == 0);
    Walk walk = begin(pager, m.tensor(0, 0), nullptr, { { 7 } });  // the last layer is left: nothing there is upcoming
    REQUIRE(use(pager, m, *walk.op, 7));
    read_all(pager);
    CHECK(pager.evict_all(*m.model) == 8);  // all but expert 7: its layer is not done
    CHECK(m.model->evictions == 8);
    pass(pager, m, nullptr, { { 0, 2 } });
    CHECK(m.model->rereads == 4);
    check_accounts(pager, { &m });
}

TEST_CASE("each token of each layer is an event with its experts and which of them were there") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    pass(pager, m, nullptr, { { 4, 2 } });
    pass(pager, m, nullptr, { { 3, 4 }, { 2, 6 } });
    spac_event events[8];
    REQUIRE(m.model->events.read(0, events, 8) == 6);
    CHECK(m.model->tokens == 3);
    CHECK(m.model->ubatches == 2);
    const struct {
        int token, layer, expert_0, expert_1, hit_mask;
    } expected[] = { { 0, 0, 4, 2, 0 }, { 0, 1, 4, 2, 0 }, { 1, 0, 3, 4, 2 }, { 2, 0, 2, 6, 1 }, { 1, 1, 3, 4, 2 }, { 2, 1, 2, 6, 1 } };
    for (int i = 0; i < 6; ++i) {
        CAPTURE(i);
        CHECK(events[i].token == (uint64_t) expected[i].token);
        CHECK(events[i].layer == first_layer + expected[i].layer);
        CHECK(events[i].n_experts == 2);
        CHECK(events[i].experts[0] == expected[i].expert_0);
        CHECK(events[i].experts[1] == expected[i].expert_1);
        CHECK(events[i].hit_mask == (uint32_t) expected[i].hit_mask);
    }
}

TEST_CASE("a token has one number in all layers, whatever another context computes between them") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context a(pager), b(pager);
    begin(pager, m.tensor(0, 0), &a, { { 0 }, { 1 } });
    begin(pager, m.tensor(0, 0), &b, { { 2 } });
    begin(pager, m.tensor(1, 0), &a, { { 3 }, { 4 } });
    spac_event events[5];
    REQUIRE(m.model->events.read(0, events, 5) == 5);
    CHECK(events[2].token == 2);
    CHECK(events[3].token == events[0].token);
    CHECK(events[4].token == events[1].token);
}

//
// order
//

TEST_CASE("an op walks what is resident first, then what is being read, then the rest") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    std::vector<int> order;
    m.store->on_read = [&] {
        if (m.state(0, 0, 6) == State::reading) {
            order = begin(pager, m.tensor(0, 0), nullptr, { { 1, 3 }, { 5, 6 } }).order;
        }
    };
    m.prefetch(pager, 0, 3, 1, 0);
    m.prefetch(pager, 0, 5, 1, 1);
    m.prefetch(pager, 0, 6, 1, 2);
    read_all(pager);
    CHECK(order == std::vector<int>{ 3, 5, 6, 1 });
}

TEST_CASE("a demand overtakes the prefetches in the queue") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    m.prefetch(pager, 1, 1);
    m.prefetch(pager, 1, 2);
    begin(pager, m.tensor(1, 0), nullptr, { { 7, 2 } });  // 2 is queued already, and moves to the front
    read_all(pager);
    CHECK(m.experts_read() == std::vector<int>{ 2, 7, 2, 7, 1, 1 });  // the op's tensor, the layer's other one, the rest
}

TEST_CASE("prefetches are read by deadline, then by utility") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    CHECK(m.prefetch(pager, 1, 0, 1.0f, 2) == 2);
    CHECK(m.prefetch(pager, 1, 1, 0.1f, 0) == 2);
    CHECK(m.prefetch(pager, 1, 2, 0.5f, 0) == 2);
    CHECK(m.prefetch(pager, 1, 3, 0.5f, 7) == 2);
    CHECK(m.prefetch(pager, 1, 3, 0.7f, 0) == 0);  // queued already, but wanted sooner
    read_all(pager);
    CHECK(m.experts_read() == std::vector<int>{ 3, 3, 2, 2, 1, 1, 0, 0 });
}

TEST_CASE("a prefetch of what is not there to be read queues nothing") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    pass(pager, m, nullptr, { { 0 } });
    CHECK(m.prefetch(pager, 0, 0) == 0);   // resident
    CHECK(m.prefetch(pager, 0, 8) == 0);   // no such expert
    CHECK(m.prefetch(pager, 0, -1) == 0);
    CHECK(m.prefetch(pager, 5, 0) == 0);   // no such layer
    CHECK(m.prefetch(pager, 0, 1, 0) == 0);  // no use
    CHECK_FALSE(read_one(pager));
}

//
// room
//

// Bundle 0 is used often and 1 was used once, some time ago: both fill the budget of four slices.
static void fill_with_0_and_1(Pager & pager, TestModel & m) {
    pass(pager, m, nullptr, { { 1 } });
    for (int i = 0; i < 30; ++i) {
        pass(pager, m, nullptr, { { 0 } });
    }
    REQUIRE(m.resident(0, 0));
    REQUIRE(m.resident(0, 1));
}

TEST_CASE("a prefetch evicts only what is worth less than itself") {
    TestModel m(Shape{ 1 });
    Pager     pager(slices(4));
    pager.add_model(m.model, 0);
    fill_with_0_and_1(pager, m);
    m.prefetch(pager, 0, 2, 0.0001f);
    CHECK_FALSE(read_one(pager));
    m.prefetch(pager, 0, 2, 1);
    m.prefetch(pager, 0, 3, 0.3f);
    CHECK(read_all(pager) == 2);
    CHECK(m.resident(0, 0));
    CHECK(m.resident(0, 2));
    CHECK_FALSE(m.resident(0, 1));
    check_accounts(pager, { &m });
}

TEST_CASE("a prefetch that may evict nothing does not hold up a worthier one with a later deadline") {
    TestModel m(Shape{ 1 });
    Pager     pager(slices(4));
    pager.add_model(m.model, 0);
    fill_with_0_and_1(pager, m);
    m.prefetch(pager, 0, 2, 0.0001f, 0);
    REQUIRE_FALSE(read_one(pager));
    m.prefetch(pager, 0, 3, 1, 1);
    CHECK(read_all(pager) == 2);
    CHECK(m.resident(0, 3));
}

//
// what is foreseen
//

TEST_CASE("what is nearly certain is read ahead, layer by layer, into what is worth less") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    CHECK(m.foresee(pager, 1, { 5 }, 0.8f) == 0);  // not certain enough
    CHECK(m.foresee(pager, 1, { 5, 6 }) == 4);
    CHECK(m.foresee(pager, 1, { 5, 6 }) == 0);     // queued already
    CHECK(read_all(pager) == 4);
    CHECK(m.resident(1, 5));
    CHECK(m.resident(1, 6));
    CHECK(m.model->ahead_reads == 4);
    CHECK(m.model->ahead_bytes == m.model->bytes_read);
    pass(pager, m, nullptr, { { 5, 6 } });
    CHECK(m.model->groups[1]->hits == 2);
    CHECK(m.model->wasted_bytes == 0);
    CHECK(pager.evict_all(*m.model) > 0);
    CHECK(m.model->wasted_bytes == 0);  // they were used
    check_accounts(pager, { &m });
}

TEST_CASE("a foreseen expert stays, one that is not foreseen goes") {
    for (int kept : { 0, 1 }) {
        TestModel m(Shape{ 1 });
        Pager     pager(slices(4));
        pager.add_model(m.model, 0);
        fill_with_0_and_1(pager, m);
        m.foresee(pager, 0, { kept });
        m.prefetch(pager, 0, 2, 0.99f);
        CHECK(read_all(pager) == 2);
        CHECK(m.resident(0, kept));
        CHECK_FALSE(m.resident(0, 1 - kept));
    }
}

TEST_CASE("a guess waits while a demand is queued or read") {
    TestModel m(Shape{ 3 });
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    m.foresee(pager, 2, { 5 });
    std::vector<State> seen;
    m.store->on_read = [&] { seen.push_back(m.state(2, 0, 5)); };
    begin(pager, m.tensor(0, 0), nullptr, { { 1 } });
    CHECK(read_all(pager) == 4);
    CHECK(m.experts_read() == std::vector<int>{ 1, 1, 5, 5 });
    CHECK(seen[0] == State::queued);
    CHECK(seen[1] == State::queued);
}

TEST_CASE("a wrong guess leaves the queue when the layer has chosen, a right one is a demand then") {
    TestModel m(Shape{ 3 });
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    CHECK(m.foresee(pager, 1, { 2, 3 }) == 4);
    begin(pager, m.tensor(1, 0), nullptr, { { 3, 4 } });
    CHECK(m.state(1, 0, 2) == State::absent);
    CHECK(m.state(1, 1, 2) == State::absent);
    read_all(pager);
    CHECK(m.experts_read() == std::vector<int>{ 3, 4, 3, 4 });
    CHECK(m.model->ahead_reads == 0);
    m.prefetch(pager, 2, 7);  // what somebody asked for by name is no guess
    begin(pager, m.tensor(2, 0), nullptr, { { 1 } });
    CHECK(m.state(2, 0, 7) == State::queued);
}

static constexpr size_t five_pieces = ((size_t) 9 << 19) + 96;

TEST_CASE("a wrong guess that is being read is abandoned at its next piece, and its room given back") {
    TestModel m(Shape{ 2, 1, 6, five_pieces });
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    PagedTensor & tensor = m.tensor(1, 0);
    m.store->on_read = [&] {
        if (m.store->offsets().size() == 2) {
            begin(pager, tensor, nullptr, { { 4 } });
        }
    };
    m.foresee(pager, 1, { 2 });
    REQUIRE(read_one(pager));
    CHECK(m.store->offsets().size() == 2);
    CHECK(m.state(1, 0, 2) == State::absent);
    CHECK(m.model->wasted_bytes == tensor.piece_begin(2));
    CHECK(m.model->ahead_bytes == tensor.piece_begin(2));
    CHECK(m.model->read_errors == 0);
    CHECK(pager.used_bytes() == 0);
    CHECK(read_all(pager) == 1);
    CHECK(m.model->rereads == 0);
    CHECK(m.resident(1, 4));
    check_accounts(pager, { &m });
}

TEST_CASE("a wrong guess that is whole before anybody looked stays until it is evicted, as waste") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    bool begun = false;
    m.store->on_read = [&] {
        if (!begun) {
            begun = true;
            begin(pager, m.tensor(1, 0), nullptr, { { 4 } });
        }
    };
    m.foresee(pager, 1, { 2 });
    REQUIRE(read_one(pager));
    CHECK(m.model->wasted_bytes == 0);
    CHECK(pager.evict_all(*m.model) == 1);
    CHECK(m.model->wasted_bytes == m.tensor(1, 0).slice_bytes);
    check_accounts(pager, { &m });
}

TEST_CASE("a guess that is being read when its layer chooses it is read by several threads from then on") {
    TestModel m(Shape{ 1, 1, 4, five_pieces });
    Pager     pager(plenty);
    Walk      walk;
    std::mutex                mutex;
    std::set<std::thread::id> readers;
    std::atomic<int>          n_begun{ 0 };
    m.store->on_read = [&] {
        const int n = ++n_begun;
        if (n == 1) {
            walk = begin(pager, m.tensor(0, 0), nullptr, { { 2 } });
        } else {
            {
                std::lock_guard<std::mutex> lock(mutex);
                readers.insert(std::this_thread::get_id());
            }
            for (int i = 0; i < 10000 && n_begun < 3; ++i) {  // until another is there, too
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
        }
    };
    pager.add_model(m.model, 3);
    m.foresee(pager, 0, { 2 });
    while (m.state(0, 0, 2) != State::resident) {
        std::this_thread::yield();
    }
    CHECK(use(pager, m, *walk.op, 2));
    CHECK(readers.size() >= 2);
    CHECK(m.store->offsets().size() == 5);
    CHECK(m.model->reads == 1);
    CHECK(m.model->wasted_bytes == 0);
    check_accounts(pager, { &m });
}

TEST_CASE("an op's head pushes out anything idle but other heads, what comes behind it only what no op will use") {
    TestModel m;
    Pager     pager(slices(4));
    pager.add_model(m.model, 0);
    Context a(pager), b(pager);
    Walk walk_a = begin(pager, m.tensor(0, 0), &a, { { 0, 1, 2, 3 } });
    CHECK(read_all(pager) == 4);  // no room for the layer's other tensor: all four are upcoming

    Walk walk_b = begin(pager, m.tensor(1, 0), &b, { { 0, 1 } });
    CHECK(read_all(pager) == 1);
    CHECK(m.state(1, 0, 0) == State::resident);
    CHECK(m.state(0, 0, 0) == State::resident);
    CHECK(m.state(1, 0, 1) == State::queued);

    CHECK(use(pager, m, *walk_b.op, 0));  // 1 is the head now, and nobody waits for 0
    CHECK(read_one(pager));
    CHECK(m.state(1, 0, 0) == State::absent);
    CHECK(use(pager, m, *walk_b.op, 1));
    for (int e : walk_a.order) {
        CHECK(use(pager, m, *walk_a.op, e));
    }
    check_accounts(pager, { &m });
}

TEST_CASE("an op's head is read for it though somebody else has queued it meanwhile, with a lesser claim") {
    TestModel m;
    Pager     pager(slices(4));
    pager.add_model(m.model, 0);
    Context a(pager), b(pager);
    Walk walk_a = begin(pager, m.tensor(0, 0), &a, { { 0, 1, 2, 3 } });
    read_all(pager);
    begin(pager, m.tensor(1, 0), &b, { { 0 } });
    read_all(pager);  // pushes out one of a's
    for (int e : walk_a.order) {
        if (m.state(0, 0, e) == State::absent) {
            m.prefetch(pager, 0, e, 1e-6f);
        }
        CHECK(use(pager, m, *walk_a.op, e));
    }
}

TEST_CASE("an op's resident head stays when its context has gone on to another layer") {
    TestModel m;
    Pager     pager(slices(4));
    pager.add_model(m.model, 0);  // two llama_contexts that were given no spac_context share the model's own
    Walk walk_a = begin(pager, m.tensor(0, 0), nullptr, { { 0 } });
    CHECK(read_one(pager));
    begin(pager, m.tensor(1, 0), nullptr, { { 1, 2, 3, 4, 5 } });
    read_all(pager);
    REQUIRE(m.state(0, 0, 0) == State::resident);
    CHECK(use(pager, m, *walk_a.op, 0));
}

TEST_CASE("a slice in use or still to be used is not evicted by request") {
    TestModel m(Shape{ 1, 1 });
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context context(pager);
    Walk walk = begin(pager, m.tensor(0, 0), &context, { { 0, 1 } });
    read_all(pager);
    REQUIRE(pager.begin_expert(*walk.op, 0));
    taken(pager, context);  // the layer is given up: only the user keeps it
    CHECK(pager.evict_all(*m.model) == 1);
    CHECK(m.state(0, 0, 0) == State::resident);
    CHECK(m.intact(m.tensor(0, 0), 0));
    pager.end_expert(*walk.op, 0);
    CHECK(pager.evict_all(*m.model) == 1);
    check_accounts(pager, { &m });
}

TEST_CASE("a layer that needs more than the budget is read in waves, each slice once") {
    TestModel m(Shape{ 1, 3 });
    Pager     pager(m.model->floor_bytes());
    pager.add_model(m.model, 0);
    Tokens tokens;
    for (int e = 0; e < 8; ++e) {
        tokens.push_back({ e, (e + 1) % 8 });
    }
    pass(pager, m, nullptr, tokens);
    CHECK(m.model->reads == 24);
    CHECK(m.model->rereads == 0);
    CHECK(pager.peak_bytes() == pager.budget());
}

TEST_CASE("accounts hold at any budget from the floor on, for slices of any size and place") {
    const size_t page = page_size();
    std::mt19937 random(4);
    for (size_t slice_bytes : { (size_t) 96, page / 2 + 32, 2 * page, 2 * page + 96 }) {
        for (uint64_t above_floor : { (uint64_t) 0, (uint64_t) page, (uint64_t) 5 * page }) {
            CAPTURE(slice_bytes);
            CAPTURE(above_floor);
            TestModel m(Shape{ 3, 3, 8, slice_bytes, 4128 });
            Pager     pager(m.model->floor_bytes() + above_floor);
            pager.add_model(m.model, 0);
            for (int i = 0; i < 12; ++i) {
                m.prefetch(pager, (int) (random() % 3), (int) (random() % 8));
                pass(pager, m, nullptr, random_tokens(random, 1 + (int) (random() % 6), 2, 8));
                check_accounts(pager, { &m });
            }
            pager.remove_model(*m.model);
            CHECK(pager.used_bytes() == 0);
        }
    }
}

TEST_CASE("what is evicted leaves its slot to the slice that it made room for; accounts hold, huge pages or not") {
    std::mt19937 random(5);
    for (size_t slice_bytes : { 3 * page_size() + 96, ((size_t) 9 << 19) + 96 }) {
        CAPTURE(slice_bytes);
        TestModel m(Shape{ 1, 2, 6, slice_bytes, 4128 });
        Pager     pager(m.model->floor_bytes());
        pager.add_model(m.model, 0);
        std::set<uint8_t *> slots;
        for (int i = 0; i < 12; ++i) {
            pass(pager, m, nullptr, random_tokens(random, 2, 2, 6));
            check_accounts(pager, { &m });
            for (const auto & tensor : m.model->tensors) {
                for (int e = 0; e < 6; ++e) {
                    slots.insert(tensor->slices[e].slot);
                }
            }
        }
        CHECK(m.model->evictions > 10);
        CHECK(slots.size() == 1 + 4);  // those of the budget, and none
    }
}

TEST_CASE("of what is cheapest, the slice goes whose slot fits") {
    TestModel m(Shape{ 1, 2, 4, page_size() });
    // the layer's second tensor as if it had slots of another size
    m.model->pools[0] = std::make_unique<SlotPool>(page_size(), 4);
    m.tensor(0, 1).slots = m.model->pools[0].get();
    Pager pager(4 * page_size());
    pager.add_model(m.model, 0);
    m.prefetch(pager, 0, 0, 0.1f);
    m.prefetch(pager, 0, 1, 0.5f);
    CHECK(read_all(pager) == 4);
    const uint8_t * slot = m.tensor(0, 1).slices[0].slot;
    Context context(pager);
    Walk    walk = begin(pager, m.tensor(0, 1), &context, { { 2 } });
    CHECK(use(pager, m, *walk.op, 2));
    CHECK(m.tensor(0, 1).slices[2].slot == slot);
    CHECK(m.state(0, 0, 0) == State::resident);
    check_accounts(pager, { &m });
}

TEST_CASE("a read that finds too little room gives back what was left to it") {
    TestModel small(Shape{ 1, 1, 8, page_size() }), large(Shape{ 1, 1, 8, 4 * page_size() });
    Pager pager(8 * page_size());
    pager.add_model(small.model, 0);
    pager.add_model(large.model, 0);
    for (int e = 0; e < 8; ++e) {
        small.prefetch(pager, 0, e, e == 0 ? 0.1f : 0.9f);
    }
    CHECK(read_all(pager) == 8);
    large.prefetch(pager, 0, 0, 0.5f);
    CHECK(read_all(pager) == 0);
    CHECK(small.state(0, 0, 0) == State::absent);
    check_accounts(pager, { &small, &large });
}

TEST_CASE("a long prompt streams through without pushing out what decoding uses often") {
    TestModel m(Shape{ 1, 2, 64 });
    Pager     pager(slices(2 * 16));
    pager.add_model(m.model, 0);
    const Tokens often = { { 0, 1, 2, 3, 4, 5 } };
    for (int i = 0; i < 20; ++i) {
        pass(pager, m, nullptr, often);
    }
    Tokens prompt;
    for (int t = 0; t < 512; ++t) {
        prompt.push_back({ 6 + t % 58 });
    }
    pass(pager, m, nullptr, prompt);
    const uint64_t reads = m.model->reads;
    pass(pager, m, nullptr, often);
    CHECK(m.model->reads == reads);
}

//
// budgets and models
//

TEST_CASE("a smaller budget evicts at once, one below the floor is refused and changes nothing") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    pass(pager, m, nullptr, { { 0, 1, 2, 3, 4, 5, 6, 7 } });
    CHECK(pager.set_budget(m.model->floor_bytes()) == SPAC_OK);
    CHECK(pager.used_bytes() == slices(4));
    check_accounts(pager, { &m });
    CHECK(pager.set_budget(m.model->floor_bytes() - 1) == SPAC_E_BUDGET);
    CHECK(pager.budget() == m.model->floor_bytes());
    pass(pager, m, nullptr, { { 0, 1, 2, 3, 4, 5, 6, 7 } });
}

TEST_CASE("a cap evicts what is above it at once, down to the floor at most; without it the budget is what was set") {
    Shape shape;
    TestModel model(shape);
    Pager pager(8 * shape.slice_bytes);
    pager.add_model(model.model, 0);
    for (int e = 0; e < 4; ++e) {
        model.prefetch(pager, 0, e);
    }
    read_all(pager);
    REQUIRE(pager.used_bytes() == 8 * shape.slice_bytes);

    pager.set_cap(5 * shape.slice_bytes);
    CHECK(pager.budget() == 5 * shape.slice_bytes);
    CHECK(pager.used_bytes() <= pager.budget());
    CHECK(pager.set_budget(7 * shape.slice_bytes) == SPAC_OK);
    CHECK(pager.budget() == 5 * shape.slice_bytes);
    CHECK(pager.granted() == 7 * shape.slice_bytes);

    pager.set_cap(0);
    CHECK(pager.budget() == model.model->floor_bytes());
    CHECK(pager.used_bytes() <= pager.budget());
    TestModel another(shape);
    pager.add_model(another.model, 0);
    CHECK(pager.budget() >= another.model->floor_bytes());

    pager.set_cap(UINT64_MAX);
    CHECK(pager.budget() == 7 * shape.slice_bytes);
    pager.remove_model(*another.model);
    pager.remove_model(*model.model);
}

TEST_CASE("a shrinking budget waits for slices in use and leaves them whole") {
    TestModel m(Shape{ 1, 2 });
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context context(pager);
    Walk walk = begin(pager, m.tensor(0, 0), &context, { { 0, 1, 2, 3, 4, 5 } });
    read_all(pager);
    for (int e : walk.order) {
        REQUIRE(pager.begin_expert(*walk.op, e));
    }
    std::thread shrinking([&] { CHECK(pager.set_budget(slices(4)) == SPAC_OK); });
    wait_for_budget(pager, slices(4));
    const auto end_all = [&] {
        for (int e : walk.order) {
            CHECK(m.intact(m.tensor(0, 0), e));
            pager.end_expert(*walk.op, e);
        }
    };
    SUBCASE("until they are left") {
        end_all();
        shrinking.join();
        check_accounts(pager, { &m });
    }
    SUBCASE("or until a larger budget takes its place, for which nothing more is evicted") {
        CHECK(pager.set_budget(plenty) == SPAC_OK);  // enters only once the other waits
        const uint64_t evictions = m.model->evictions;
        end_all();
        pager.wake();
        shrinking.join();
        CHECK(m.model->evictions.load() == evictions);
    }
}

TEST_CASE("two models share the budget") {
    TestModel first, second;
    Pager     pager(slices(6));
    pager.add_model(first.model, 0);
    pager.add_model(second.model, 0);
    pass(pager, first, nullptr, { { 0, 1 } });
    CHECK(first.model->used_bytes == slices(6));
    pass(pager, second, nullptr, { { 0, 1 } });
    CHECK(second.model->used_bytes > 0);
    CHECK(first.model->used_bytes + second.model->used_bytes == slices(6));
    check_accounts(pager, { &first, &second });
    pass(pager, first, nullptr, { { 2, 3 } });
    check_accounts(pager, { &first, &second });
    const uint64_t left = second.model->used_bytes;
    pager.remove_model(*first.model);
    CHECK(pager.used_bytes() == left);
    pass(pager, second, nullptr, { { 0, 1 } });
}

TEST_CASE("removing a model takes its reads out of the queue and leaves another's") {
    TestModel first, second;
    Pager     pager(plenty);
    pager.add_model(first.model, 0);
    pager.add_model(second.model, 0);
    begin(pager, first.tensor(0, 0), nullptr, { { 0, 1 } });
    first.prefetch(pager, 1, 3);
    second.prefetch(pager, 1, 3);
    REQUIRE(read_one(pager));
    pager.remove_model(*first.model);
    CHECK(pager.used_bytes() == 0);
    CHECK(read_all(pager) == 2);
    CHECK(second.resident(1, 3));
    check_quiet(first);
}

TEST_CASE("removing a model waits for its read in flight, begins no more of it, and queues nothing for the model meanwhile") {
    TestModel   m(Shape{ 2, 1, 4, five_pieces });
    Pager       pager(plenty);
    std::thread removing;
    pager.add_model(m.model, 0);
    m.store->on_read = [&] {
        removing = std::thread([&] { pager.remove_model(*m.model); });
        while (m.state(0, 0, 1) != State::absent) {  // until it has begun, and waits for this read
            std::this_thread::yield();
        }
        CHECK(m.prefetch(pager, 0, 1) == 0);
        CHECK(m.foresee(pager, 0, { 2 }) == 0);
    };
    begin(pager, m.tensor(1, 0), nullptr, { { 3 } });
    m.prefetch(pager, 0, 1);
    pager.run_one_read();
    removing.join();
    CHECK(m.model->reads == 1);
    CHECK(m.store->offsets().size() == 1);
    CHECK(pager.used_bytes() == 0);
    CHECK_FALSE(read_one(pager));
    check_quiet(m);
}

TEST_CASE("halting drops what is queued, waits for the read in flight, and ends the reading threads") {
    TestModel         m;
    Pager             pager(plenty);
    std::atomic<bool> reading{ false }, go_on{ false }, ended{ false };
    m.store->on_read = [&] {
        reading = true;
        while (!go_on) {
            std::this_thread::yield();
        }
    };
    pager.add_model(m.model, 1);
    m.prefetch(pager, 0, 1);
    while (!reading) {
        std::this_thread::yield();
    }
    std::thread halting([&] {
        pager.halt();
        ended = true;
    });
    while (m.state(0, 0, 1) == State::queued || m.state(0, 1, 1) == State::queued) {
        std::this_thread::yield();
    }
    CHECK_FALSE(ended);
    go_on = true;
    halting.join();
    CHECK(m.model->reads == 1);
    m.prefetch(pager, 0, 2);
    CHECK(read_all(pager) == 2);  // nobody else did
    pager.remove_model(*m.model);
    CHECK(pager.used_bytes() == 0);
}

TEST_CASE("a prefetch for a model that was removed queues nothing") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    pager.remove_model(*m.model);
    CHECK(m.prefetch(pager, 0, 1) == 0);
    CHECK_FALSE(read_one(pager));
    check_quiet(m);
}

TEST_CASE("a pager serves the next model after its last one was removed") {
    TestModel first, second;
    Pager     pager(plenty);
    for (TestModel * m : { &first, &second }) {
        pager.add_model(m->model, 2);
        CHECK(compute(pager, *m, m->tensor(0, 0), nullptr, { { 0, 1, 2 } }, 2).n_skipped == 0);
        pager.remove_model(*m->model);
        CHECK(pager.used_bytes() == 0);
    }
    CHECK(second.model->reads > 0);
}

TEST_CASE("a pager whose last model had no reading threads serves the next one") {
    TestModel first, second;
    Pager     pager(plenty);
    pager.add_model(first.model, 0);
    pager.remove_model(*first.model);
    pager.add_model(second.model, 1);
    CHECK(compute(pager, second, second.tensor(0, 0), nullptr, { { 0, 1 } }, 2).n_skipped == 0);
}

//
// contexts, errors
//

TEST_CASE("contexts that take turns within layers all get their experts at the floor") {
    std::mt19937 random(5);
    TestModel    m;
    Pager        pager(m.model->floor_bytes());
    pager.add_model(m.model, 0);
    {
        Context contexts[3] = { Context(pager), Context(pager), Context(pager) };
        struct {
            int    step = 0;  // tensors begun
            size_t next = 0;  // expert of the walk
            Tokens tokens;
            Walk   walk;
        } runs[3];
        for (int n_ops = 0; n_ops < 60;) {
            const int i   = (int) (random() % 3);
            auto &    run = runs[i];
            if (run.next < run.walk.order.size()) {
                REQUIRE(use(pager, m, *run.walk.op, run.walk.order[run.next++]));
                continue;
            }
            if (run.step % 2 == 0) {
                run.tokens = random_tokens(random, 3, 2, 8);
            }
            run.walk = begin(pager, m.tensor(run.step / 2 % 2, run.step % 2), &contexts[i], run.tokens);
            run.next = 0;
            ++run.step;
            ++n_ops;
        }
        for (auto & run : runs) {
            while (run.next < run.walk.order.size()) {
                REQUIRE(use(pager, m, *run.walk.op, run.walk.order[run.next++]));
            }
        }
        CHECK(m.model->ubatches > 10);
    }
    check_quiet(m);
    check_accounts(pager, { &m });
}

TEST_CASE("a failed read makes all threads skip, is reported once, and the next pass is good") {
    TestModel m;
    Pager     pager(m.model->floor_bytes());
    pager.add_model(m.model, 2);
    Context context(pager);
    const Tokens tokens = { { 0, 1, 2, 3, 4 } };
    PagedTensor & tensor = m.tensor(0, 1);
    m.store->bad_offset = tensor.slice_offset(3);
    CHECK(compute(pager, m, m.tensor(0, 0), &context, tokens, 3).n_skipped == 0);
    const Outcome outcome = compute(pager, m, tensor, &context, tokens, 3);
    CHECK(outcome.skipped[3] == 3);
    CHECK(outcome.n_wrong == 0);
    CHECK(context.stopped);
    CHECK(compute(pager, m, m.tensor(1, 0), &context, tokens, 3).n_skipped == 15);

    const spac_error error = taken(pager, context);
    CHECK(error.code == SPAC_E_IO);
    CHECK(error.os_error == EIO);
    CHECK(error.offset == tensor.slice_offset(3));
    CHECK(error.length == tensor.slice_bytes);
    CHECK(error.path == m.file.path);
    CHECK(taken(pager, context).code == SPAC_OK);
    CHECK(m.model->read_errors == 1);

    m.store->bad_offset = -1;
    for (auto & each : m.model->tensors) {
        const Outcome good = compute(pager, m, *each, &context, tokens, 3);
        CHECK(good.n_skipped + good.n_wrong == 0);
    }
}

TEST_CASE("several threads read a slice's pieces; after one that failed no more are begun, and the slice's room is free again") {
    TestModel m(Shape{ 1, 1, 4, five_pieces });
    Pager     pager(plenty);
    pager.add_model(m.model, 3);
    const PagedTensor & tensor = m.tensor(0, 0);
    REQUIRE(tensor.n_pieces() == 5);
    CHECK(tensor.piece_begin(4) + tensor.piece_length(4) == five_pieces);

    std::mutex                mutex;
    std::set<std::thread::id> readers;
    std::atomic<int>          n_inside{ 0 };
    m.store->on_read = [&] {
        {
            std::lock_guard<std::mutex> lock(mutex);
            readers.insert(std::this_thread::get_id());
        }
        ++n_inside;
        for (int i = 0; i < 10000 && n_inside < 2; ++i) {  // until another is there, too
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    };
    Walk walk = begin(pager, m.tensor(0, 0), nullptr, { { 2 } });
    CHECK(pager.begin_expert(*walk.op, 2));
    CHECK(m.intact(tensor, 2));
    pager.end_expert(*walk.op, 2);
    CHECK(readers.size() >= 2);
    CHECK(m.model->reads == 1);
    CHECK(m.store->offsets().size() == 5);

    TestModel all_bad(Shape{ 1, 1, 4, five_pieces });
    Pager     at_once(plenty);
    n_inside = 0;
    all_bad.store->bad_every = 1;
    all_bad.store->on_read   = [&] {
        ++n_inside;
        for (int i = 0; i < 10000 && n_inside < 3; ++i) {  // until all are there
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    };
    at_once.add_model(all_bad.model, 3);
    begin(at_once, all_bad.tensor(0, 0), nullptr, { { 2 } });
    while (all_bad.state(0, 0, 2) != State::failed) {
        std::this_thread::yield();
    }
    at_once.remove_model(*all_bad.model);
    CHECK(all_bad.store->offsets().size() == 3);
    CHECK(all_bad.model->reads == 1);
    CHECK(at_once.used_bytes() == 0);

    TestModel bad(Shape{ 1, 1, 4, five_pieces });
    Pager     by_hand(plenty);
    by_hand.add_model(bad.model, 0);
    bad.store->bad_offset = tensor.slice_offset(2) + tensor.piece_begin(1);
    begin(by_hand, bad.tensor(0, 0), nullptr, { { 2 } });
    CHECK(read_all(by_hand) == 1);
    CHECK(bad.state(0, 0, 2) == State::failed);
    CHECK(bad.store->offsets().size() == 2);
    CHECK(by_hand.used_bytes() == 0);
    check_accounts(by_hand, { &bad });
}

TEST_CASE("a failed prefetch gives its room back and stops nobody, and is tried again when the expert is needed") {
    TestModel m(Shape{ 2, 2, 8, page_size() + 96, 4128 });
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context context(pager);
    m.store->bad_offset = m.tensor(0, 0).slice_offset(1);
    for (int e = 0; e < 3; ++e) {
        m.prefetch(pager, 0, e);
    }
    CHECK(read_all(pager) == 6);
    CHECK(m.state(0, 0, 1) == State::failed);
    CHECK_FALSE(context.stopped);
    check_accounts(pager, { &m });
    m.store->bad_offset = -1;
    pass(pager, m, &context, { { 1 } });
    CHECK(taken(pager, context).code == SPAC_OK);
}

TEST_CASE("a read that fails after a layer began which did not ask for it stops nobody, and is tried again") {
    TestModel m(Shape{ 2, 1 });
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context context(pager);
    Walk    walk;
    m.store->bad_offset = m.tensor(0, 0).slice_offset(1);
    m.store->on_read    = [&] {
        if (!walk.op) {
            walk = begin(pager, m.tensor(0, 0), &context, { { 1 } });
        }
    };
    m.foresee(pager, 0, { 1 });
    REQUIRE(read_one(pager));
    CHECK(m.model->read_errors == 1);
    m.store->bad_offset = -1;
    CHECK(use(pager, m, *walk.op, 1));
    CHECK(taken(pager, context).code == SPAC_OK);
}

TEST_CASE("cancelling wakes threads that wait for reads, and the next pass is good") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context     context(pager);
    Outcome     outcome;
    std::thread computing([&] { outcome = compute(pager, m, m.tensor(0, 0), &context, { { 0, 1 } }, 3); });
    while (m.state(0, 0, 1) != State::queued) {  // no read ever runs
        std::this_thread::yield();
    }
    context.stop(SPAC_E_CANCELLED, 0, "", 0, 0);
    pager.wake();
    computing.join();
    CHECK(outcome.n_skipped == 6);
    CHECK(taken(pager, context).code == SPAC_E_CANCELLED);
    CHECK_FALSE(read_one(pager));  // what only the cancelled layer wanted has left the queue
    pass(pager, m, &context, { { 0, 1 } });
}

TEST_CASE("a stopped context does not stop another one in the same layer") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context a(pager), b(pager);
    Walk walk_a = begin(pager, m.tensor(0, 0), &a, { { 0, 1 } });
    Walk walk_b = begin(pager, m.tensor(0, 0), &b, { { 1, 0 } });
    a.stop(SPAC_E_CANCELLED, 0, "", 0, 0);
    for (int e : walk_a.order) {
        CHECK_FALSE(use(pager, m, *walk_a.op, e));  // takes the reads that b waits for out of the queue
    }
    for (int e : walk_b.order) {
        CHECK(use(pager, m, *walk_b.op, e));
    }
}

TEST_CASE("a file that changed stops the next ubatch, reading nothing") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    Context context(pager);
    REQUIRE(truncate(m.file.path.c_str(), 100) == 0);
    Walk walk = begin(pager, m.tensor(0, 0), &context, { { 0 } });
    CHECK_FALSE(use(pager, m, *walk.op, 0));
    CHECK_FALSE(read_one(pager));
    const spac_error error = taken(pager, context);
    CHECK(error.code == SPAC_E_CHANGED);
    CHECK(error.path == m.file.path);
}

TEST_CASE("a model whose load failed stops whoever decodes with it") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    m.model->unusable = SPAC_E_BUDGET;
    Walk walk = begin(pager, m.tensor(0, 0), nullptr, { { 0 } });
    CHECK_FALSE(use(pager, m, *walk.op, 0));
    CHECK(taken(pager, m.model->default_context).code == SPAC_E_BUDGET);
}

TEST_CASE("a model that found no room harms no other, and goes") {
    TestModel m;
    Pager     pager(m.model->floor_bytes());
    pager.add_model(m.model, 1);
    Shape shape;
    shape.store    = SPAC_STORE_MMAP;
    shape.arranged = false;
    TestModel none(shape);
    none.store->no_room = true;
    CHECK_THROWS_AS(none.model->arrange(), std::bad_alloc);
    pager.add_model(none.model, 1);
    std::mt19937 random(7);
    for (auto & tensor : m.model->tensors) {
        const Outcome outcome = compute(pager, m, *tensor, nullptr, random_tokens(random, 8, 4, 8), 2);
        CHECK(outcome.n_wrong + outcome.n_skipped == 0);
    }
    CHECK(m.model->evictions > 0);
    pager.remove_model(*none.model);
    pager.remove_model(*m.model);
}

TEST_CASE("a guess of no certain worth is not read") {
    TestModel m;
    Pager     pager(plenty);
    pager.add_model(m.model, 0);
    const std::vector<float> none((size_t) m.model->n_bundles(), 0), rest(none.size(), 1);
    CHECK(pager.foresee(*m.model, { none.data(), none.data(), rest.data(), std::nanf("") }) == 0);
    CHECK(m.prefetch(pager, 0, 1, 1, INT32_MAX) == 2);  // the latest of all, and no demand
    CHECK(pager.run_one_read());
    CHECK(m.model->ahead_reads == 1);
}

//
// threads
//

TEST_CASE("many compute threads get through a working set above the budget at the floor") {
    for (int n_io_threads : { 1, 3 }) {
        TestModel m(Shape{ 3, 3, 16, page_size() + 96, 4128 });
        Pager     pager(m.model->floor_bytes());
        pager.add_model(m.model, n_io_threads);
        std::mt19937 random(6);
        for (int i = 0; i < 10; ++i) {
            const Tokens tokens = random_tokens(random, 8, 4, 16);
            for (auto & tensor : m.model->tensors) {
                const Outcome outcome = compute(pager, m, *tensor, nullptr, tokens, 4);
                CHECK(outcome.n_wrong + outcome.n_skipped == 0);
            }
        }
        CHECK(pager.peak_bytes() <= pager.budget());
        CHECK(m.model->rereads > 0);
    }
}

TEST_CASE("a thread that waits for room gets it from threads that leave experts behind which others have not reached yet") {
    TestModel m(Shape{ 1, 1 });
    Pager     pager(slices(4));
    pager.add_model(m.model, 1);
    Walk walk = begin(pager, m.tensor(0, 0), nullptr, { { 0, 1, 2, 3 } }, 3);
    const std::vector<int> & order = walk.order;
    const auto through = [&](int from, int to) {  // of the order, staying inside the last one
        for (int i = from; i <= to; ++i) {
            CHECK(pager.begin_expert(*walk.op, order[i]));
            if (i < to) {
                pager.end_expert(*walk.op, order[i]);
            }
        }
    };
    through(0, 3);
    through(0, 2);
    through(0, 0);
    std::thread shrinking([&] { CHECK(pager.set_budget(slices(2)) == SPAC_OK); });
    while (m.state(0, 0, order[1]) != State::absent) {
        std::this_thread::yield();
    }
    pager.end_expert(*walk.op, order[0]);
    shrinking.join();
    std::thread waiting([&] {
        CHECK(pager.begin_expert(*walk.op, order[1]));
        pager.end_expert(*walk.op, order[1]);
        through(2, 3);
        pager.end_expert(*walk.op, order[3]);
    });
    while (m.state(0, 0, order[1]) != State::queued) {
        std::this_thread::yield();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // until the reading thread has looked in vain
    pager.end_expert(*walk.op, order[2]);
    pager.end_expert(*walk.op, order[3]);
    waiting.join();
    check_accounts(pager, { &m });
}

// Several contexts decode at once, with several threads each, while budgets, prefetches, evictions, failures and cancels
// come in between.
static void stress(unsigned seed, int store, bool faults, size_t slice_bytes) {
    CAPTURE(seed);
    TestModel first(Shape{ 3, 3, 12, slice_bytes, 4128, store }), second(Shape{ 2, 2, 6, page_size() / 2 + 32, 96, store });
    TestModel * models[] = { &first, &second };
    const uint64_t floor = std::max(first.model->floor_bytes(), second.model->floor_bytes()), most = 8 * floor;
    Pager pager(most);
    pager.add_model(first.model, 1);
    pager.add_model(second.model, 3);
    first.store->bad_every  = faults ? 97 : 0;
    std::atomic<int> n_wrong{ 0 }, n_good{ 0 }, n_unexplained{ 0 };

    const auto session = [&](int number) {
        std::mt19937 random(seed * 10 + number);
        TestModel &  m         = *models[number % 2];
        const int    n_experts = m.model->n_experts;
        Context      context(pager);
        for (int i = 0; i < 25; ++i) {
            Tokens tokens = random_tokens(random, 1 + (int) (random() % 6), 2, n_experts);
            bool   good   = true;
            for (size_t t = 0; good && t < m.model->tensors.size(); ++t) {
                for (int k = 0; k < 2; ++k) {
                    m.prefetch(pager, (int) (random() % m.model->groups.size()), (int) (random() % n_experts), 1, (int) (random() % 3));
                }
                if (random() % 6 == 0) {
                    pager.set_budget(floor + random() % (most - floor));
                }
                if (random() % 20 == 0) {
                    pager.evict_all(*m.model);
                }
                if (faults && random() % 40 == 0) {
                    context.stop(SPAC_E_CANCELLED, 0, "", 0, 0);
                    pager.wake();
                }
                const Outcome outcome = compute(pager, m, *m.model->tensors[t], &context, tokens, 1 + (int) (random() % 3));
                n_wrong += outcome.n_wrong;
                n_unexplained += outcome.n_skipped > 0 && !context.stopped ? 1 : 0;
                good = !context.stopped;
            }
            n_good += good ? 1 : 0;
            taken(pager, context);
        }
    };
    std::vector<std::thread> sessions;
    for (int number = 0; number < 3; ++number) {
        sessions.emplace_back(session, number);
    }
    for (auto & thread : sessions) {
        thread.join();
    }
    CHECK(n_wrong == 0);
    CHECK(n_unexplained == 0);
    CHECK((faults ? n_good > 0 : n_good == 75));
    CHECK(pager.peak_bytes() <= most);
    pager.remove_model(*first.model);
    pager.remove_model(*second.model);  // ends the reading threads
    CHECK(pager.used_bytes() == 0);
    check_quiet(first);
    check_quiet(second);
}

TEST_CASE("under stress every expert that a thread is given holds the file's bytes") {
    for (unsigned seed = 1; seed <= 4; ++seed) {
        stress(seed, SPAC_STORE_MOCK, false, page_size() + 160);
        stress(seed, SPAC_STORE_AUTO, false, page_size() + 160);
    }
}

TEST_CASE("under stress failures and cancels stop only whom they concern, and leave nothing behind") {
    for (unsigned seed = 5; seed <= 8; ++seed) {
        stress(seed, SPAC_STORE_MOCK, true, page_size() + 160);
        stress(seed, SPAC_STORE_AUTO, true, page_size() + 160);
    }
    stress(9, SPAC_STORE_MOCK, true, ((size_t) 1 << 20) + 160);  // of two pieces
}
