#include "library.h"
#include "testing.h"

#include <atomic>
#include <fstream>

using namespace spac;
using namespace spac::testing;

static constexpr uint64_t wanted = 1000;

TEST_CASE("what is missing is taken at once, from what is used") {
    PressureRule rule;
    CHECK(rule.cap(5, 800, wanted, 0) == no_cap);
    CHECK(rule.cap(-100, 800, wanted, 1) == 700);
    CHECK(rule.cap(-50, 750, wanted, 1.05) == 650);  // what was asked for already is not there yet
    CHECK(rule.cap(-5000, 600, wanted, 1.1) == 0);
}

TEST_CASE("nothing is taken again before there was enough for a while; then slowly, and all of it in the end") {
    PressureRule rule;
    rule.cap(-100, 800, wanted, 10);
    CHECK(rule.cap(5000, 700, wanted, 10 + 0.99 * PressureRule::calm_s) == 700);
    double now = 10 + PressureRule::calm_s;
    uint64_t before = rule.cap(5000, 700, wanted, now);
    while (before != no_cap) {
        now += 0.5;
        const uint64_t cap = rule.cap(5000, 700, wanted, now);
        CHECK((cap == no_cap || (cap > before && cap - before <= wanted * 0.5 / PressureRule::grow_s)));
        before = cap;
    }
    CHECK(now < 10 + PressureRule::calm_s + PressureRule::grow_s);
}

TEST_CASE("growing takes at most half of what is to spare, and ends at the next shortage") {
    PressureRule rule;
    rule.cap(-100, 800, wanted, 0);
    CHECK(rule.cap(10, 700, wanted, 100) == 705);
    CHECK(rule.cap(-1, 705, wanted, 101) == 704);
    CHECK(rule.cap(1000, 704, wanted, 102) == 704);
}

TEST_CASE("a clock that jumps back gives nothing and takes nothing") {
    PressureRule rule;
    rule.cap(-100, 800, wanted, 100);
    CHECK(rule.cap(1000, 700, wanted, 1) == 700);
}

struct Folder {
    std::filesystem::path path;

    Folder() {
        std::string name = std::filesystem::temp_directory_path() / "spac-test-XXXXXX";
        REQUIRE(mkdtemp(name.data()));
        path = name;
    }
    ~Folder() { std::filesystem::remove_all(path); }
    void write(const char * name, const std::string & text) const {
        std::ofstream(path / "new") << text;  // renamed, so that no reader sees half of it
        std::filesystem::rename(path / "new", path / name);
    }
    Gauge gauge(uint64_t headroom = 0) const { return { path.string(), headroom }; }
};

TEST_CASE("a gauge reads groups of both versions, and the machine") {
    const Folder folder;
    CHECK(!folder.gauge().spare());

    SUBCASE("version 1") {
        folder.write("memory.limit_in_bytes", "1000\n");
        folder.write("memory.usage_in_bytes", "400\n");
        CHECK(folder.gauge().spare() == 600);
        CHECK(folder.gauge(50).spare() == 550);
        folder.write("memory.limit_in_bytes", "9223372036854771712\n");
        CHECK(!folder.gauge().spare());
    }
    SUBCASE("version 2: the lower of both limits") {
        folder.write("memory.max", "max\n");
        folder.write("memory.high", "max\n");
        folder.write("memory.current", "400\n");
        CHECK(!folder.gauge().spare());
        folder.write("memory.max", "1000\n");
        CHECK(folder.gauge().spare() == 600);
        folder.write("memory.high", "700\n");
        CHECK(folder.gauge().spare() == 300);
    }
    SUBCASE("unused page cache is no shortage") {
        folder.write("memory.max", "1000\n");
        folder.write("memory.current", "900\n");
        folder.write("memory.stat", "anon 800\nfile 90\ninactive_file 60\n");
        CHECK(folder.gauge(150).spare() == 10);
        CHECK(folder.gauge(200).spare() == -40);
    }
    SUBCASE("the machine") {
        folder.write("meminfo", "MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:      64 kB\n");
        CHECK(folder.gauge().spare() == 64 * 1024);
    }
    SUBCASE("while tasks wait for memory more is kept free") {
        folder.write("meminfo", "MemAvailable:      64 kB\n");
        Gauge gauge = folder.gauge(32 * 1024);
        gauge.stalled = true;
        CHECK(gauge.spare() == -64 * 1024);
    }
    SUBCASE("damaged files are no limit") {
        folder.write("memory.limit_in_bytes", "lots\n");
        folder.write("memory.usage_in_bytes", "");
        folder.write("meminfo", "MemAvailable\nMemAvailable: ?\n");
        CHECK(!folder.gauge().spare());
    }
}

TEST_CASE("the watch reports the tightest gauge until it is told to end") {
    const Folder a, b;
    a.write("meminfo", "MemAvailable: 2 kB\n");
    b.write("memory.max", "1000\n");
    b.write("memory.current", "400\n");
    std::mutex mutex;
    std::condition_variable seen;
    std::optional<int64_t> last;
    PressureWatch watch([&](std::optional<int64_t> spare, double) {
        std::lock_guard<std::mutex> lock(mutex);
        last = spare;
        seen.notify_all();
    });
    const auto wait_for = [&](std::optional<int64_t> spare) {
        std::unique_lock<std::mutex> lock(mutex);
        return seen.wait_for(lock, std::chrono::seconds(20), [&] { return last == spare; });
    };
    watch.watch({ a.gauge(), b.gauge() });
    CHECK(wait_for(600));
    b.write("memory.current", "900\n");
    CHECK(wait_for(100));
    watch.watch({ a.gauge() });
    CHECK(wait_for(2048));
    watch.watch({});
    last = std::nullopt;
    a.write("meminfo", "MemAvailable: 1 kB\n");
    CHECK(last == std::nullopt);
}
