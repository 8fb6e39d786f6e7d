#include "context.h"

#include <sys/mman.h>
#include <unistd.h>

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

bool spac_context::trim() {
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t base  = compute_base.exchange(0);
    const uintptr_t begin = (base + page - 1) / page * page;
    const uintptr_t end   = (base + compute_bytes) / page * page;
    return base && begin < end && madvise((void *) begin, end - begin, MADV_DONTNEED) == 0;
}
