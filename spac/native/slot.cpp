#include "slot.h"

#include "pager.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include <sys/mman.h>

namespace spac {

//
// pools
//

// A process may have so many mappings (vm.max_map_count), and a slot's huge pages are one, what lies before them another: three
// eighths leave a quarter of all to everything else.
static int most_huge_slots() {
    long mappings = 0;
    if (FILE * file = std::fopen("/proc/sys/vm/max_map_count", "r")) {
        if (std::fscanf(file, "%ld", &mappings) != 1) {
            mappings = 0;
        }
        std::fclose(file);
    }
    return (int) std::min(mappings, 1L << 30) / 8 * 3;
}

static std::atomic<int> n_huge_slots{ 0 };  // of all pools

SlotPool::SlotPool(size_t slot_bytes, int n_slots) : slot_bytes_(slot_bytes) {
    const size_t huge = huge_page_size(), align = huge > 0 && huge <= slot_bytes ? huge : page_size();
    free_.reserve((size_t) n_slots);  // first: if it fails, there is nothing to undo
    stride_   = (slot_bytes + align - 1) / align * align;
    size_     = stride_ * (size_t) n_slots;
    n_mapped_ = size_ + align;  // the kernel may give less aligned
    mapped_   = mmap(nullptr, n_mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) {
        throw std::runtime_error("no " + std::to_string(n_mapped_) + " bytes of address space for the experts: " + std::strerror(errno) +
                                 " (see ulimit -v)");
    }
    begin_    = (uint8_t *) (((uintptr_t) mapped_ + align - 1) / align * align);
    madvise(mapped_, n_mapped_, MADV_NOHUGEPAGE);  // one page at a time: a huge page would be more than was accounted for
    madvise(mapped_, n_mapped_, MADV_DONTFORK);
    if (align == huge) {
        use_huge_pages(n_slots);
    }
    for (int i = n_slots; i-- > 0;) {
        free_.push_back(begin_ + (size_t) i * stride_);
    }
}

SlotPool::~SlotPool() {
    munmap(mapped_, n_mapped_);
    n_huge_slots -= n_huge_;
}

// Those that lie within a slot come and go with it, and cost what they hold. Filling one takes one fault instead of hundreds.
void SlotPool::use_huge_pages(int n_slots) {
    static const int most = most_huge_slots();
    const size_t length = slot_bytes_ / huge_page_size() * huge_page_size();
    while (n_huge_ < n_slots && n_huge_slots < most && madvise(begin_ + (size_t) n_huge_ * stride_, length, MADV_HUGEPAGE) == 0) {
        ++n_huge_;
        ++n_huge_slots;
    }
}

uint8_t * SlotPool::take() {
    uint8_t * slot = free_.back();
    free_.pop_back();
    return slot;
}

void SlotPool::give_back(uint8_t * slot) {
    madvise(slot, slot_bytes_, MADV_DONTNEED);
    free_.push_back(slot);
}

//
// tensors
//

size_t PagedTensor::page_bytes(int expert) const {
    return (misplaced(expert) + slice_bytes + page_size() - 1) / page_size() * page_size();
}

size_t PagedTensor::most_page_bytes() const {
    size_t most = 0;
    for (int e = 0; e < n_experts; ++e) {
        most = std::max(most, page_bytes(e));
    }
    return most;
}

void PagedTensor::occupy(int expert) {
    if (slots && !slices[expert].slot) {
        slices[expert].slot = slots->take();
    }
}

bool PagedTensor::leave(int expert, PagedTensor & heir, int heir_expert) {
    Slice & from = slices[expert], & to = heir.slices[heir_expert];
    if (!slots || slots != heir.slots || to.slot) {
        return false;
    }
    to.slot   = from.slot;
    from.slot = nullptr;
    return true;
}

void PagedTensor::vacate(int expert) {
    if (slots) {
        slots->give_back(slices[expert].slot);
        slices[expert].slot = nullptr;
        return;
    }
    // a page that a neighbour touches, too, comes back by itself when it is looked at
    const size_t before = misplaced(expert);
    model->store->drop(*file, slice_data(expert) - before, page_bytes(expert), slice_offset(expert) - before);
}

}  // namespace spac
