// A ring of routing events: one writer at a time, any number of readers, no lock. A reader that falls behind loses the
// oldest events, never gets a torn one.
#pragma once

#include "include/spac.h"

#include <array>
#include <atomic>
#include <cstring>
#include <vector>

namespace spac {

class EventRing {
  public:
    explicit EventRing(size_t capacity) : slots_(capacity) {}

    uint64_t written() const { return written_.load(std::memory_order_acquire); }

    // event.sequence is filled in
    void write(spac_event event) {
        const uint64_t sequence = written_.load(std::memory_order_relaxed);
        Slot & slot = slots_[sequence % slots_.size()];
        event.sequence = sequence;
        std::array<uint64_t, n_words> words;
        std::memcpy(words.data(), &event, sizeof event);
        slot.version.store(2 * sequence + 1, std::memory_order_seq_cst);  // odd: being written
        for (size_t i = 0; i < n_words; ++i) {
            slot.words[i].store(words[i], std::memory_order_seq_cst);
        }
        slot.version.store(2 * sequence + 2, std::memory_order_seq_cst);
        written_.store(sequence + 1, std::memory_order_release);
    }

    // Copies up to n events from sequence number `from` on; returns how many.
    int read(uint64_t from, spac_event * events, int n) const {
        const uint64_t end = written();
        uint64_t sequence = end > slots_.size() && from < end - slots_.size() ? end - slots_.size() : from;
        int copied = 0;
        for (; sequence < end && copied < n; ++sequence) {
            const Slot & slot = slots_[sequence % slots_.size()];
            std::array<uint64_t, n_words> words;
            const uint64_t before = slot.version.load(std::memory_order_seq_cst);
            for (size_t i = 0; i < n_words; ++i) {
                words[i] = slot.words[i].load(std::memory_order_seq_cst);
            }
            const uint64_t after = slot.version.load(std::memory_order_seq_cst);
            if (before == after && before == 2 * sequence + 2) {  // else overwritten meanwhile
                std::memcpy(&events[copied++], words.data(), sizeof(spac_event));
            }
        }
        return copied;
    }

  private:
    static constexpr size_t n_words = sizeof(spac_event) / sizeof(uint64_t);
    static_assert(sizeof(spac_event) % sizeof(uint64_t) == 0, "events are copied by words");

    struct Slot {
        std::atomic<uint64_t> version{ 0 };
        std::array<std::atomic<uint64_t>, n_words> words{};
    };

    std::vector<Slot>     slots_;
    std::atomic<uint64_t> written_{ 0 };
};

}  // namespace spac
