// One line for people, per thread, behind every negative return code of the C ABI.
#pragma once

#include "include/spac.h"

#include <exception>
#include <string>

namespace spac {

// Stores the line for spac_last_error() and returns code.
int fail(int code, const std::string & line);

// "PATH: what: strerror(os_error)"
std::string os_message(const std::string & path, const char * what, int os_error);

const char * last_error();

// Nothing throws across the ABI; what can throw here is an allocation.
template <typename F> int guarded(F && body) {
    try {
        return body();
    } catch (const std::exception & e) {
        return fail(SPAC_E_MEMORY, e.what());
    }
}

}  // namespace spac
