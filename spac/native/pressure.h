// Watches how much memory the machine and its control groups have left, and takes from the experts' budget what is missing.
//
// A budget that was right when a model was loaded is wrong when another program starts. What is missing is given back at once, and
// taken again slowly, once there has been enough for a while.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace spac {

constexpr uint64_t no_cap = std::numeric_limits<uint64_t>::max();

// How much of the budget may be used, from one look to the next.
class PressureRule {
  public:
    // Seconds without a shortage before anything is taken again, and in which all of it would be.
    static constexpr double calm_s = 2, grow_s = 16;

    // spare: free bytes beyond what must stay free, negative where they are missing; used: what experts take; now: seconds.
    uint64_t cap(int64_t spare, uint64_t used, uint64_t wanted, double now);

  private:
    uint64_t cap_        = no_cap;
    double   last_short_ = 0, last_look_ = 0;
};

// A place to look: a control group's folder, of version 1 or 2, or the folder of "meminfo" (/proc).
class Gauge {
  public:
    Gauge(std::string folder, uint64_t headroom_bytes) : folder_(std::move(folder)), headroom_(headroom_bytes) {}

    // Free bytes beyond the headroom; nothing where there is no limit or none that can be read.
    std::optional<int64_t> spare() const;

    // The kernel's pressure stall information: a file that can be polled for POLLPRI; -1 where there is none. The caller closes it.
    int open_stalls() const;

    bool   stalled = false;   // lately, tasks waited for memory: more is kept free then
    double stalled_at = 0;

  private:
    std::optional<int64_t> free_bytes() const;

    std::string folder_;
    uint64_t    headroom_;
};

// The thread that looks. `look` gets the bytes to spare, or nothing if nothing is limited, and the time in seconds.
class PressureWatch {
  public:
    using Look = std::function<void(std::optional<int64_t> spare, double now)>;

    explicit PressureWatch(Look look) : look_(std::move(look)) {}
    ~PressureWatch() { watch({}); }

    void watch(std::vector<Gauge> gauges);  // instead of those before; none: the thread ends

  private:
    void run(std::vector<Gauge> gauges, int stop);

    Look        look_;
    std::mutex  mutex_;
    std::thread thread_;
    int         stop_ = -1;  // an eventfd
};

}  // namespace spac
