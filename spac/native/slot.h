// Slots: where the bytes of a paged tensor lie while they are in memory.
//
// A slice is one expert's part of a tensor. While it is present it has a slot to itself: whole pages, congruent with its place in
// the file to the page, so that whole pages can be read in place. Slices of one size share a pool of slots, and what is evicted
// leaves its slot, pages and all, to the slice that it made room for: the kernel need not find and zero others. Under a store that
// maps the file a slice lies where the mapping has it.
#pragma once

#include "repack.h"
#include "store.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace spac {

struct Model;
struct Group;
struct Op;

// Slots of one size: reserved address space, filled page by page when it is written to.
class SlotPool {
  public:
    SlotPool(size_t slot_bytes, int n_slots);  // throws if there is no address space
    SlotPool(const SlotPool &) = delete;
    SlotPool & operator=(const SlotPool &) = delete;
    ~SlotPool();

    uint8_t * take();                   // one that has no pages; there must be one
    void      give_back(uint8_t * slot);  // and its pages

    // All slots, for whoever counts pages.
    uint8_t * begin() const { return begin_; }
    size_t    size() const { return size_; }

  private:
    void use_huge_pages(int n_slots);

    size_t    slot_bytes_;
    size_t    stride_;             // from one slot to the next
    size_t    size_;               // of the whole
    uint8_t * begin_    = nullptr;
    void *    mapped_   = nullptr;
    size_t    n_mapped_ = 0;
    int       n_huge_   = 0;       // slots with huge pages
    std::vector<uint8_t *> free_;  // the last one is taken first
};

// A slice is present from the moment its read begins until it is evicted: both cost pages.
enum class State : uint8_t { absent, queued, reading, resident, failed };

struct Slice {
    std::atomic<State>   state{ State::absent };
    std::atomic<int32_t> users{ 0 };    // compute threads inside; a slice in use is never evicted
    uint8_t *            slot = nullptr;  // while it is present, of a store that does not map; changed under the pager's mutex
    // the rest is guarded by the pager's mutex
    int32_t  upcoming = 0;              // ops that will still use it; evicted only for the slice that an op needs next
    bool     was_read = false;
    bool     guess    = false;          // queued or being read because somebody foresees it
    bool     ahead    = false;          // was read because of a guess, and not used since
    bool     abandoned = false;         // the guess was wrong: whoever reads it may stop
    bool     retry    = false;          // being read since before the layer that needs it began: a failure is not that layer's
    int32_t  os_error = 0;              // why state is failed
    int32_t  n_begun  = 0;              // of its pieces, while state is reading: somebody reads or has read them
    int32_t  n_inside = 0;              // of these: not there yet
    // the place in the queue while state is queued
    int32_t  deadline = 0;
    double   rank     = 0;
    Op *     op       = nullptr;        // the op that demands it (deadline 0), else null
};

struct PagedTensor {
    std::string name;
    Model *     model       = nullptr;
    Group *     group       = nullptr;
    int         part        = 0;        // index in group->parts
    int         rank        = 0;        // order of use within a layer: gate and up 0, down 1
    int         n_experts   = 0;
    size_t      slice_bytes = 0;
    size_t      piece_bytes = 0;        // a slice is read in pieces of this size, the last one may be smaller
    size_t      slot_bytes  = 0;        // that a present slice costs: whole pages
    ModelFile * file        = nullptr;
    uint64_t    offset      = 0;        // of expert 0 in the file
    SlotPool *  slots       = nullptr;  // null: the store maps the file
    std::shared_ptr<uint8_t> mapped;    // then expert 0
    std::unique_ptr<Repacker> repacker; // null: slices stay as they are in the file
    std::unique_ptr<Slice[]> slices;

    uint64_t slice_offset(int expert) const { return offset + (uint64_t) expert * slice_bytes; }
    size_t   misplaced(int expert) const { return slice_offset(expert) % page_size(); }  // from where a page begins
    // Of a present slice.
    uint8_t * slice_data(int expert) const {
        return mapped ? mapped.get() + (size_t) expert * slice_bytes : slices[expert].slot + misplaced(expert);
    }
    // Of all pages that the slice touches; and of the slice that touches most.
    size_t page_bytes(int expert) const;
    size_t most_page_bytes() const;

    int    n_pieces() const { return (int) ((slice_bytes + piece_bytes - 1) / piece_bytes); }
    size_t piece_begin(int piece) const { return (size_t) piece * piece_bytes; }
    size_t piece_length(int piece) const { return std::min(piece_bytes, slice_bytes - piece_begin(piece)); }

    bool present(int expert) const {
        const State s = slices[expert].state.load(std::memory_order_relaxed);
        return s == State::reading || s == State::resident;
    }

    void occupy(int expert);  // takes a slot, unless it was left one
    bool leave(int expert, PagedTensor & heir, int heir_expert);  // its slot to the heir; false: that needs none, or another
    void vacate(int expert);  // gives its pages back
};

}  // namespace spac
