#include "window.h"

#include <algorithm>

#include <sys/mman.h>

namespace spac {

// Is another present slice on this page? Slices may be smaller than a page, so there can be many.
bool PagedTensor::neighbour_on_page(int expert, uintptr_t page) const {
    const uintptr_t base = (uintptr_t) data, page_end = page + page_size();
    const int first = page <= base ? 0 : (int) ((page - base) / slice_bytes);
    for (int e = first; e < n_experts && base + (uintptr_t) e * slice_bytes < page_end; ++e) {
        if (e != expert && present(e)) {
            return true;
        }
    }
    return false;
}

void PagedTensor::own_pages(int expert, uint8_t *& address, size_t & length) const {
    const uintptr_t page = page_size(), begin = (uintptr_t) slice_data(expert), end = begin + slice_bytes;
    uintptr_t first = begin / page * page, last = (end + page - 1) / page * page;  // [first, last)
    if (neighbour_on_page(expert, first)) {
        first += page;
    }
    if (first < last && neighbour_on_page(expert, last - page)) {
        last -= page;
    }
    address = (uint8_t *) first;
    length  = first < last ? last - first : 0;
}

size_t PagedTensor::own_page_bytes(int expert) const {
    uint8_t * address;
    size_t    length;
    own_pages(expert, address, length);
    return length;
}

// The huge pages that fit into a slice: [first, last); false if none does.
bool PagedTensor::huge_pages(int expert, uintptr_t & first, uintptr_t & last) const {
    const size_t huge = huge_page_size();
    if (huge == 0 || huge > slice_bytes) {
        return false;
    }
    const uintptr_t begin = (uintptr_t) slice_data(expert);
    first = (begin + huge - 1) / huge * huge;
    last  = (begin + slice_bytes) / huge * huge;
    return first < last;
}

int PagedTensor::use_huge_pages(int at_most) const {
    int       n = 0;
    uintptr_t first, last;
    for (int e = 0; e < n_experts && n < at_most; ++e) {
        if (huge_pages(e, first, last) && madvise((void *) first, last - first, MADV_HUGEPAGE) == 0) {
            ++n;
        }
    }
    return n;
}

void PagedTensor::inner_pages(int expert, uint8_t *& begin, uint8_t *& end) const {
    const uintptr_t page = page_size(), slice = (uintptr_t) slice_data(expert);
    begin = (uint8_t *) ((slice + page - 1) / page * page);
    end   = std::max(begin, (uint8_t *) ((slice + slice_bytes) / page * page));
}

size_t PagedTensor::same_mapping(int expert, const uint8_t * begin, const uint8_t * end) const {
    uintptr_t at = (uintptr_t) begin, until = (uintptr_t) end, first, last;
    if (huge_pages(expert, first, last)) {
        until = std::min(until, at < first ? first : at < last ? last : until);
    }
    return until - at;
}

size_t PagedTensor::page_bytes(int expert) const {
    const uintptr_t page = page_size(), begin = (uintptr_t) slice_data(expert), end = begin + slice_bytes;
    return ((end + page - 1) / page - begin / page) * page;
}

}  // namespace spac
