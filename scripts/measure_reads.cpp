// Random O_DIRECT reads of a file: a pool of threads that pread, against one thread with io_uring. Why spac uses the former.
//
//   g++ -O2 -o build/measure_reads scripts/measure_reads.cpp -luring -lpthread      # liburing-dev
//   build/measure_reads FILE > docs/benchmarks/reads.txt                           # a file of a gigabyte or more

#include <liburing.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

using Offsets = std::vector<long>;

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static void expect(bool ok, const char * what) {
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static void read_with_threads(int fd, long length, int depth, const Offsets & offsets) {
    std::atomic<size_t> next{ 0 };
    std::vector<std::thread> threads;
    for (int i = 0; i < depth; ++i) {
        threads.emplace_back([&] {
            void * buffer = std::aligned_alloc(4096, length);
            for (size_t at; (at = next++) < offsets.size();) {
                expect(pread(fd, buffer, length, offsets[at]) == length, "pread");
            }
            std::free(buffer);
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

static void read_with_uring(int fd, long length, int depth, const Offsets & offsets) {
    io_uring ring;
    expect(io_uring_queue_init(depth, &ring, 0) == 0, "io_uring_queue_init");
    std::vector<void *> buffers(depth);
    size_t submitted = 0;
    auto submit = [&](unsigned slot) {
        io_uring_sqe * entry = io_uring_get_sqe(&ring);
        io_uring_prep_read(entry, fd, buffers[slot], length, offsets[submitted++]);
        io_uring_sqe_set_data64(entry, slot);
    };
    for (int slot = 0; slot < depth; ++slot) {
        buffers[slot] = std::aligned_alloc(4096, length);
        if (submitted < offsets.size()) {
            submit(slot);
        }
    }
    io_uring_submit(&ring);
    for (size_t done = 0; done < offsets.size(); ++done) {
        io_uring_cqe * entry;
        expect(io_uring_wait_cqe(&ring, &entry) == 0 && entry->res == length, "io_uring read");
        const unsigned slot = (unsigned) entry->user_data;
        io_uring_cqe_seen(&ring, entry);
        if (submitted < offsets.size()) {
            submit(slot);
            io_uring_submit(&ring);
        }
    }
    for (void * buffer : buffers) {
        std::free(buffer);
    }
    io_uring_queue_exit(&ring);
}

int main(int argc, char ** argv) {
    expect(argc == 2, "usage: measure_reads FILE");
    const int fd = open(argv[1], O_RDONLY | O_DIRECT);
    expect(fd >= 0, argv[1]);
    const long size = lseek(fd, 0, SEEK_END);
    constexpr int repeats = 7;
    std::mt19937_64 random(1);
    printf("MB/s, median of %d runs in turn (lowest to highest)\n%8s %6s %28s %28s\n", repeats, "KiB", "depth", "threads", "io_uring");
    for (const long length : { 64L << 10, 1L << 20, 4L << 20 }) {
        for (const int depth : { 1, 2, 6, 16 }) {
            std::vector<double> rates[2];
            for (int i = 0; i < 2 * repeats; ++i) {
                Offsets offsets(std::min(500L, (400L << 20) / length));
                for (long & offset : offsets) {
                    offset = (long) (random() % (unsigned long) (size / length)) * length;
                }
                const double begin = seconds();
                (i % 2 ? read_with_uring : read_with_threads)(fd, length, depth, offsets);
                rates[i % 2].push_back((double) offsets.size() * (double) length / (seconds() - begin) / 1e6);
            }
            printf("%8ld %6d", length >> 10, depth);
            for (auto & values : rates) {
                std::sort(values.begin(), values.end());
                printf("   %7.0f (%6.0f to %6.0f)", values[repeats / 2], values.front(), values.back());
            }
            printf("\n");
        }
    }
}
