// Windows: where the bytes of a paged tensor lie when they are in memory, and what they cost in pages.
//
// A window is a range of reserved address space, congruent with the file offset to the page, so that whole pages are read in
// place. A slice is one expert's part of a tensor. Slices do not end on page boundaries: a page on a boundary belongs to
// every slice that touches it, is paid for once, and stays for as long as one of them is present.
#pragma once

#include "repack.h"
#include "store.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace spac {

struct Model;
struct Group;
struct Op;

// A slice is present from the moment its read begins until it is evicted: both cost pages.
enum class State : uint8_t { absent, queued, reading, resident, failed };

struct Slice {
    std::atomic<State>   state{ State::absent };
    std::atomic<int32_t> users{ 0 };    // compute threads inside; a slice in use is never evicted
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
    uint8_t *   data        = nullptr;  // of expert 0
    ModelFile * file        = nullptr;
    uint64_t    offset      = 0;        // of expert 0 in the file
    std::unique_ptr<Repacker> repacker; // null: slices stay as they are in the file
    std::unique_ptr<Slice[]> slices;

    uint8_t * slice_data(int expert) const { return data + (size_t) expert * slice_bytes; }
    uint64_t  slice_offset(int expert) const { return offset + (uint64_t) expert * slice_bytes; }

    int    n_pieces() const { return (int) ((slice_bytes + piece_bytes - 1) / piece_bytes); }
    size_t piece_begin(int piece) const { return (size_t) piece * piece_bytes; }
    size_t piece_length(int piece) const { return std::min(piece_bytes, slice_bytes - piece_begin(piece)); }

    bool present(int expert) const {
        const State s = slices[expert].state.load(std::memory_order_relaxed);
        return s == State::reading || s == State::resident;
    }

    // Bytes of the pages that only this slice keeps, or would bring, given which neighbours are present.
    size_t own_page_bytes(int expert) const;
    // The same as an address range of whole pages; length 0 if there are none.
    void own_pages(int expert, uint8_t *& address, size_t & length) const;
    // Those that no neighbour touches, present or not.
    void inner_pages(int expert, uint8_t *& begin, uint8_t *& end) const;
    // Bytes from begin on, up to end at most, that are one mapping to the kernel: huge pages are another.
    size_t same_mapping(int expert, const uint8_t * begin, const uint8_t * end) const;
    // Bytes of all pages that the slice touches.
    size_t page_bytes(int expert) const;
    // Lets the kernel use huge pages where one lies within one slice: it comes and goes with the slice, and costs what it holds.
    // Filling it takes one fault instead of hundreds. For anonymous memory. Each such range is a mapping of its own to the kernel,
    // and so is what lies before it: stops at that many ranges. Returns how many there are.
    int use_huge_pages(int at_most) const;

  private:
    bool neighbour_on_page(int expert, uintptr_t page) const;
    bool huge_pages(int expert, uintptr_t & first, uintptr_t & last) const;
};

}  // namespace spac
