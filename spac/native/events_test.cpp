#include "events.h"

#include <doctest/doctest.h>

#include <thread>

using namespace spac;

// Every field follows from the number, so that a mixture of two events shows.
static spac_event event_of(uint64_t n) {
    spac_event event{};
    event.token     = n * 3;
    event.stall_ns  = n * 5;
    event.hit_mask  = (uint32_t) (n * 7);
    event.layer     = (uint16_t) (n * 11);
    event.n_experts = (uint16_t) (n * 13);
    for (int i = 0; i < SPAC_EVENT_MAX_EXPERTS; ++i) {
        event.experts[i] = (uint16_t) (n * 17 + (uint64_t) i);
    }
    return event;
}

static bool whole(const spac_event & event) {
    spac_event expected = event_of(event.sequence);
    expected.sequence   = event.sequence;
    return std::memcmp(&event, &expected, sizeof event) == 0;
}

static void write_events(EventRing & ring, uint64_t n) {
    for (uint64_t i = 0; i < n; ++i) {
        ring.write(event_of(ring.written()));
    }
}

TEST_CASE("events come back in order, from any sequence number, at most n at a time") {
    EventRing  ring(8);
    spac_event events[8];
    write_events(ring, 5);
    CHECK(ring.written() == 5);
    REQUIRE(ring.read(1, events, 3) == 3);
    for (int i = 0; i < 3; ++i) {
        CHECK(events[i].sequence == (uint64_t) (1 + i));
        CHECK(whole(events[i]));
    }
    CHECK(ring.read(4, events, 8) == 1);
}

TEST_CASE("there is nothing to read in an empty ring, at its end and beyond") {
    EventRing  ring(8);
    spac_event events[1];
    CHECK(ring.read(0, events, 1) == 0);
    write_events(ring, 3);
    CHECK(ring.read(3, events, 1) == 0);
    CHECK(ring.read(1000, events, 1) == 0);
}

TEST_CASE("a reader that fell behind gets the newest events that the ring holds") {
    EventRing  ring(8);
    spac_event events[16];
    write_events(ring, 8 * 5 + 3);
    REQUIRE(ring.read(2, events, 16) == 8);
    for (int i = 0; i < 8; ++i) {
        CHECK(events[i].sequence == (uint64_t) (35 + i));
        CHECK(whole(events[i]));
    }
}

TEST_CASE("a reader beside the writer gets whole events, each once, in order, the last among them") {
    constexpr uint64_t n_events = 100000;
    EventRing   ring(4);
    std::thread writer([&] { write_events(ring, n_events); });
    uint64_t next = 0, n_read = 0, n_bad = 0;
    while (next < n_events) {
        spac_event events[4];
        const int n = ring.read(next, events, 4);
        for (int i = 0; i < n; ++i) {
            n_bad += whole(events[i]) && events[i].sequence >= next ? 0 : 1;
            next = events[i].sequence + 1;
            ++n_read;
        }
    }
    writer.join();
    CHECK(n_bad == 0);
    CHECK(n_read > 0);
}
