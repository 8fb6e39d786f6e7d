#include "pressure.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

namespace spac {

static constexpr int look_every_ms = 50;

// While tasks wait for memory, or did a moment ago, so many times the headroom stays free.
static constexpr int    stalled_headrooms = 4;
static constexpr double stalled_s         = 2;

// 100 ms of waiting in two seconds. A window of whole two seconds needs no privilege (Documentation/accounting/psi.rst).
static constexpr char stall_trigger[] = "some 100000 2000000";

//
// the rule
//

uint64_t PressureRule::cap(int64_t spare, uint64_t used, uint64_t wanted, double now) {
    const double passed = std::max(0.0, now - last_look_);
    last_look_ = now;
    if (spare < 0) {
        const uint64_t most = std::min(cap_, used), missing = (uint64_t) -spare;
        cap_        = most > missing ? most - missing : 0;
        last_short_ = now;
    } else if (cap_ != no_cap && now - last_short_ >= calm_s) {
        // half of what is to spare: others may be growing, too
        cap_ += std::min((uint64_t) spare / 2, (uint64_t) ((double) wanted * std::min(1.0, passed / grow_s)));
    }
    if (cap_ >= wanted) {
        cap_ = no_cap;
    }
    return cap_;
}

//
// places to look
//

// The beginning of a small file of the kernel's.
static std::string read_text(const std::string & path) {
    std::string text(16384, '\0');
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    const ssize_t n = fd < 0 ? -1 : read(fd, text.data(), text.size());
    if (fd >= 0) {
        close(fd);
    }
    text.resize(n > 0 ? (size_t) n : 0);
    return text;
}

static std::optional<int64_t> number(std::string_view text) {
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    int64_t value;
    return std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc() ? std::optional(value) : std::nullopt;
}

// The number behind a name at the beginning of a line.
static std::optional<int64_t> field(const std::string & text, const std::string & name) {
    const size_t at = ("\n" + text).find("\n" + name);
    return at == std::string::npos ? std::nullopt : number(std::string_view(text).substr(at + name.size()));
}

std::optional<int64_t> Gauge::free_bytes() const {
    if (const auto kib = field(read_text(folder_ + "/meminfo"), "MemAvailable:")) {
        return *kib * 1024;
    }
    std::optional<int64_t> limit;
    for (const char * name : { "/memory.max", "/memory.high", "/memory.limit_in_bytes" }) {
        const auto value = number(read_text(folder_ + name));  // "max" is no number, and version 1 writes a huge one for none
        if (value && *value < (int64_t{ 1 } << 60) && (!limit || *value < *limit)) {
            limit = value;
        }
    }
    auto used = limit ? number(read_text(folder_ + "/memory.current")) : std::nullopt;
    if (limit && !used) {
        used = number(read_text(folder_ + "/memory.usage_in_bytes"));
    }
    return used ? std::optional(*limit - *used) : std::nullopt;
}

std::optional<int64_t> Gauge::spare() const {
    const auto free = free_bytes();
    if (!free) {
        return std::nullopt;
    }
    const int64_t spare = *free - (int64_t) headroom_ * (stalled ? stalled_headrooms : 1);
    if (spare >= 0) {
        return spare;
    }
    // page cache that nobody uses is counted as used by a group, and leaves when room is wanted
    const std::string stat  = read_text(folder_ + "/memory.stat");
    const auto        cache = field(stat, "total_inactive_file ");
    return spare + (cache ? *cache : field(stat, "inactive_file ").value_or(0));
}

int Gauge::open_stalls() const {
    for (const char * name : { "/memory.pressure", "/pressure/memory" }) {
        const int fd = open((folder_ + name).c_str(), O_RDWR | O_NONBLOCK | O_CLOEXEC);
        if (fd >= 0 && write(fd, stall_trigger, sizeof stall_trigger) == (ssize_t) sizeof stall_trigger) {
            return fd;
        }
        if (fd >= 0) {
            close(fd);
        }
    }
    return -1;
}

//
// the thread
//

void PressureWatch::watch(std::vector<Gauge> gauges) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (thread_.joinable()) {
        const uint64_t one = 1;
        while (write(stop_, &one, sizeof one) < 0 && errno == EINTR) {}
        thread_.join();
        close(stop_);
    }
    if (!gauges.empty() && (stop_ = eventfd(0, EFD_CLOEXEC)) >= 0) {
        thread_ = std::thread([this, gauges = std::move(gauges), stop = stop_]() mutable { run(std::move(gauges), stop); });
    }
}

void PressureWatch::run(std::vector<Gauge> gauges, int stop) {
    std::vector<pollfd> files = { { stop, POLLIN, 0 } };
    for (const Gauge & gauge : gauges) {
        files.push_back({ gauge.open_stalls(), POLLPRI, 0 });  // poll() passes over -1
    }
    for (;;) {
        poll(files.data(), files.size(), look_every_ms);
        if (files[0].revents) {
            break;
        }
        const double now = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
        std::optional<int64_t> least;
        for (size_t i = 0; i < gauges.size(); ++i) {
            if (files[i + 1].revents & POLLERR) {  // the group is gone
                close(files[i + 1].fd);
                files[i + 1].fd = -1;
            } else if (files[i + 1].revents & POLLPRI) {
                gauges[i].stalled_at = now;
                gauges[i].stalled    = true;
            }
            gauges[i].stalled = gauges[i].stalled && now - gauges[i].stalled_at < stalled_s;
            const auto spare = gauges[i].spare();
            least = spare && (!least || *spare < *least) ? spare : least;
        }
        look_(least, now);
    }
    for (size_t i = 1; i < files.size(); ++i) {
        if (files[i].fd >= 0) {
            close(files[i].fd);
        }
    }
}

}  // namespace spac
