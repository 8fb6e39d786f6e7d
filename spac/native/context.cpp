#include "context.h"

#include "store.h"

#include <sys/mman.h>

#include <cstring>

void spac_context::stop(int code, int os_error, const std::string & path, uint64_t offset, uint64_t length) {
    std::lock_guard<std::mutex> lock(error_mutex_);
    if (error_.code == SPAC_OK) {
        error_.code     = code;
        error_.os_error = os_error;
        error_.offset   = offset;
        error_.length   = length;
        std::strncpy(error_.path, path.c_str(), sizeof error_.path - 1);
    }
    stopped.store(true, std::memory_order_release);
}

int spac_context::take(spac_error & error) {
    std::lock_guard<std::mutex> lock(error_mutex_);
    const uint64_t struct_size = error.struct_size;
    error             = error_;
    error.struct_size = struct_size;
    error_            = spac_error{};
    stopped.store(false, std::memory_order_release);
    return error.code;
}

void spac_context::computes_in(void * base, size_t bytes) {
    const size_t    page  = spac::kernel_page_size();
    uint8_t * const begin = (uint8_t *) spac::align_up((uintptr_t) base, page);
    uint8_t * const end   = (uint8_t *) spac::align_down((uintptr_t) base + bytes, page);
    const size_t    whole = begin < end ? (size_t) (end - begin) : 0;
    if (compute_begin_ != begin || compute_bytes_ != whole) {
        madvise(begin, whole, MADV_NOHUGEPAGE);
        compute_begin_ = begin;
        compute_bytes_ = whole;
    }
}

bool spac_context::trim() {
    uint8_t * const begin = compute_begin_.exchange(nullptr);
    return begin && compute_bytes_ > 0 && madvise(begin, compute_bytes_, MADV_DONTNEED) == 0;
}
