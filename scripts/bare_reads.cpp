// The bare reader that the pager's misses are measured against: O_DIRECT, a pool of threads that pread.
// Reads what stdin says, a line at a time, and prints the seconds that a line took, from its first read's start to its last one's end.
//
//   g++ -O2 -std=c++17 -o build/bare_reads scripts/bare_reads.cpp -lpthread
//   echo "3 huge 0:4718592 4718592:4718592 9437184:4718592" | build/bare_reads FILE    # reads in flight, pages, offset:length ...
//
// Pages: "huge" ones are the fastest there is: fewer segments make larger requests. "small" ones are what the pager has once its budget
// is used up. Both stay.

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static constexpr long block = 4096, huge = 2 << 20;

struct Read {
    long offset, length;  // whole blocks
};

static std::mutex              mutex;
static std::condition_variable work, finished;
static std::vector<Read>       reads;
static size_t                  next_read = 0, n_done = 0;
static int                     depth     = 0;
static bool                    small     = false;

static void expect(bool ok, const char * what) {
    if (!ok) {
        perror(what);
        exit(1);
    }
}

// A thread's memory for one read.
struct Buffer {
    char * data   = nullptr;
    long   length = 0;

    void allocate(long wanted, int advice) {
        if (wanted <= length) {
            return;
        }
        const long size = (wanted + 2 * huge - 1) / huge * huge;  // what a shorter one had stays until the end
        char * memory = (char *) mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        expect(memory != MAP_FAILED, "mmap");
        data   = (char *) (((long) memory + huge - 1) / huge * huge);
        length = wanted;
        madvise(memory, size, advice);
        memset(data, 1, wanted);
    }
};

static void serve(int fd, int number) {
    Buffer huge_pages, small_pages;
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
        work.wait(lock, [&] { return number < depth && next_read < reads.size(); });
        const Read read = reads[next_read++];
        Buffer & buffer = small ? small_pages : huge_pages;
        lock.unlock();
        buffer.allocate(read.length, small ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
        for (long done = 0; done < read.length;) {
            const ssize_t n = pread(fd, buffer.data + done, read.length - done, read.offset + done);
            expect(n >= 0, "pread");
            if (n == 0) {
                break;  // the file's last block
            }
            done += n;
        }
        lock.lock();
        if (++n_done == reads.size()) {
            finished.notify_one();
        }
    }
}

int main(int argc, char ** argv) {
    expect(argc == 2, "usage: bare_reads FILE < lines");
    const int fd = open(argv[1], O_RDONLY | O_DIRECT);
    expect(fd >= 0, argv[1]);
    std::vector<std::thread> threads;
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream text(line);
        std::vector<Read>  wanted;
        int  in_flight = 0;
        long offset, length;
        char colon;
        std::string pages;
        text >> in_flight >> pages;
        while (text >> offset >> colon >> length) {
            const long begin = offset / block * block, end = (offset + length + block - 1) / block * block;
            wanted.push_back({ begin, end - begin });
        }
        while ((int) threads.size() < in_flight) {
            threads.emplace_back(serve, fd, (int) threads.size());
        }
        const auto begin = std::chrono::steady_clock::now();
        {
            std::unique_lock<std::mutex> lock(mutex);
            depth     = in_flight;
            small     = pages == "small";
            reads     = wanted;
            next_read = n_done = 0;
            work.notify_all();
            finished.wait(lock, [&] { return n_done == reads.size(); });
        }
        printf("%.6f\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
        fflush(stdout);
    }
    _exit(0);
}
