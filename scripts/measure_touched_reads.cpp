// Random O_DIRECT reads of a file by six threads, 1 MiB each, and whether it matters to the disk that a processor then touches what arrived.
//
//   g++ -O2 -o build/measure_touched_reads scripts/measure_touched_reads.cpp -lpthread
//   build/measure_touched_reads FILE > docs/benchmarks/touched-reads.txt           # a file of a gigabyte or more
//
// A virtual disk probably copies into the guest's memory from a thread of the host. Lines that are in a cache of the guest's processors are then
// written from wherever that thread runs: as fast as untouched ones, or at little more than half.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static constexpr size_t piece = 1 << 20, huge_page = 2 << 20, target_bytes = 1 << 30;
static constexpr int    n_threads = 6, n_rounds = 3, n_samples = 16;

struct Kind {
    const char * name;
    bool         copied;    // out of where it arrived, as a pager must
    size_t       n_places;  // pieces of memory that a thread reads into in turn
};

static char * huge_pages(size_t size) {
    void * const all = mmap(nullptr, size + huge_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    char * const first = (char *) (((uintptr_t) all + huge_page - 1) / huge_page * huge_page);
    madvise(first, size, MADV_HUGEPAGE);
    memset(first, 0, size);
    return first;
}

static void measure(const Kind & kind, int fd, size_t file_bytes, char * target) {
    std::atomic<uint64_t> n_bytes{ 0 };
    std::atomic<bool> stopping{ false };
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; ++i) {
        threads.emplace_back([&, i] {
            const size_t size = kind.n_places * piece < huge_page ? huge_page : kind.n_places * piece;
            char * const places = huge_pages(size);
            std::mt19937_64 random(i);
            for (size_t turn = 0; !stopping; ++turn) {
                char * const place = places + turn % kind.n_places * piece;
                if (pread(fd, place, piece, (off_t) (random() % ((file_bytes - piece) / 4096) * 4096)) != (ssize_t) piece) {
                    perror("pread");
                    exit(1);
                }
                if (kind.copied) {
                    memcpy(target + random() % (target_bytes / piece) * piece, place, piece);
                }
                n_bytes += piece;
            }
            munmap(places, size);
        });
    }
    printf("%-36s", kind.name);
    double all = 0;
    for (int i = 0; i < n_samples; ++i) {
        const uint64_t before = n_bytes;
        const auto begin = std::chrono::steady_clock::now();
        std::this_thread::sleep_for(std::chrono::milliseconds(500));
        const double rate = (n_bytes - before) / 1e9 / std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        printf(" %.1f", rate);
        all += rate;
    }
    printf("   mean %.2f\n", all / n_samples);
    fflush(stdout);
    stopping = true;
    for (std::thread & thread : threads) {
        thread.join();
    }
}

int main(int argc, char ** argv) {
    struct stat file;
    const int fd = argc == 2 ? open(argv[1], O_RDONLY | O_DIRECT) : -1;
    if (fd < 0 || fstat(fd, &file) != 0 || (size_t) file.st_size < 2 * piece) {
        fprintf(stderr, "usage: measure_touched_reads FILE, on a disk that takes O_DIRECT\n");
        return 1;
    }
    char * const target = huge_pages(target_bytes);
    puts("GB/s, by half second");
    for (int round = 0; round < n_rounds; ++round) {
        for (const Kind & kind : { Kind{ "untouched", false, 1 }, Kind{ "copied out", true, 1 }, Kind{ "copied out, 16 places in turn", true, 16 } }) {
            measure(kind, fd, (size_t) file.st_size, target);
        }
    }
}
