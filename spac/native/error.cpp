#include "error.h"

#include <cstring>

namespace spac {

static thread_local std::string line_of_thread;

int fail(int code, const std::string & line) {
    line_of_thread = line;
    return code;
}

std::string os_message(const std::string & path, const char * what, int os_error) {
    return path + ": " + what + ": " + std::strerror(os_error);
}

const char * last_error() {
    return line_of_thread.c_str();
}

}  // namespace spac
