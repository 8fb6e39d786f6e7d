// What a device gives: reads as the pager makes them, products as llama.cpp computes them, and what waking a thread costs.
// Measures only; spac/device.py decides what is worth measuring, and keeps it.
#include "include/spac.h"

#include "error.h"
#include "ggml-alloc.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "repack.h"
#include "store.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>

using spac::fail;
using spac::guarded;

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t huge_page    = 2 << 20;
constexpr size_t line_bytes   = 64;
constexpr int    max_threads  = 1024;
constexpr size_t max_read     = (size_t) 1 << 30;

double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

double median(std::vector<double> & times) {
    const auto middle = times.begin() + (ptrdiff_t) (times.size() / 2);
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
}

//
// reads
//

// A reading thread's memory, in huge pages or small ones, that are there before the clock starts.
class ReadMemory {
  public:
    ReadMemory() = default;
    ReadMemory(const ReadMemory &) = delete;
    ReadMemory & operator=(const ReadMemory &) = delete;
    ~ReadMemory() {
        if (memory_ != MAP_FAILED) {
            munmap(memory_, size_);
        }
    }

    bool allocate(size_t length, bool huge) {
        size_   = (length + 2 * huge_page - 1) / huge_page * huge_page;
        memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory_ == MAP_FAILED) {
            return false;
        }
        data = (char *) (((uintptr_t) memory_ + huge_page - 1) / huge_page * huge_page);
        madvise(memory_, size_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        std::memset(data, 0, length);
        return true;
    }

    char * data = nullptr;

  private:
    void * memory_ = MAP_FAILED;
    size_t size_ = 0;
};

// Of reads that go on, from the first to the last and again, until they are stopped.
struct Endless {
    std::atomic<bool>     stop{ false };
    std::atomic<uint64_t> n_bytes{ 0 };
};

bool can_be_read(const spac_reads * test) {
    return test && test->struct_size == sizeof(spac_reads) && test->path && test->offsets && test->lengths && test->n_reads >= 1 &&
           test->depth >= 1 && test->depth <= max_threads && test->store != SPAC_STORE_MMAP;
}

int measure_reads(spac_reads & test, Endless * endless = nullptr) {
    int  os_error = 0;
    auto store    = spac::open_store(test.store, test.path, os_error);
    spac::ModelFile file;
    file.path = test.path;
    if (!store || (os_error = store->open(file)) != 0) {
        return fail(SPAC_E_IO, spac::os_message(test.path, "cannot be read from", os_error));
    }
    size_t longest = 0;
    for (int64_t i = 0; i < test.n_reads; ++i) {
        if (test.lengths[i] == 0 || test.lengths[i] > max_read || test.offsets[i] > file.size || test.lengths[i] > file.size - test.offsets[i]) {
            return fail(SPAC_E_ARGUMENT, std::string(test.path) + ": a read lies outside the file, or has no length");
        }
        longest = std::max(longest, (size_t) test.lengths[i]);
    }
    if (store->id() != SPAC_STORE_DIRECT) {
        posix_fadvise(file.fd, 0, 0, POSIX_FADV_DONTNEED);  // cold
    }

    std::mutex              mutex;
    std::condition_variable changed;
    int                     n_ready = 0, n_left = test.depth;
    bool                    go = false;
    std::atomic<int64_t>    next{ 0 };
    std::atomic<int>        error{ 0 };
    const auto serve = [&] {
        ReadMemory memory;
        if (!memory.allocate(longest, test.pages == SPAC_PAGES_HUGE || test.pages == SPAC_PAGES_TOUCHED)) {
            error = ENOMEM;
        }
        if (test.pages == SPAC_PAGES_PAGER) {
            store->begin_thread();
        }
        std::unique_lock<std::mutex> lock(mutex);
        ++n_ready;
        changed.notify_all();
        changed.wait(lock, [&] { return go; });
        lock.unlock();
        while (error == 0 && !(endless && endless->stop)) {
            int64_t i = next++;
            if (i >= test.n_reads && !endless) {
                break;
            }
            i %= test.n_reads;
            const spac::ReadResult result = test.pages == SPAC_PAGES_PAGER ?
                store->read(file, memory.data, test.lengths[i], test.offsets[i]) :
                store->read_in_place(file, memory.data, test.lengths[i], test.offsets[i]);
            if (result.os_error != 0) {
                error = result.os_error;
            }
            if (endless) {
                endless->n_bytes += test.lengths[i];
            }
            for (size_t at = 0; test.pages == SPAC_PAGES_TOUCHED && at < test.lengths[i]; at += line_bytes) {
                (void) *(volatile const char *) (memory.data + at);
            }
        }
        lock.lock();
        --n_left;
        changed.notify_all();
    };
    std::vector<std::thread> threads;
    try {
        for (int i = 0; i < test.depth; ++i) {
            threads.emplace_back(serve);
        }
    } catch (const std::exception &) {
        error  = EAGAIN;
        n_left = (int) threads.size();
    }
    {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return n_ready == (int) threads.size(); });
        go = true;
        const auto begin = Clock::now();
        changed.notify_all();
        changed.wait(lock, [&] { return n_left == 0; });
        test.seconds = seconds_since(begin);
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    return error == 0 ? SPAC_OK : fail(SPAC_E_IO, spac::os_message(test.path, "cannot be read", error));
}

//
// what stores find
//

int probe_stores(const char * path, spac_probe & probe) {
    const size_t page = spac::page_size();
    probe.page_bytes  = page;

    spac::ModelFile direct, mapped;
    direct.path = mapped.path = path;
    const auto direct_store = spac::make_store(SPAC_STORE_DIRECT), mmap_store = spac::make_store(SPAC_STORE_MMAP);
    if (const int os_error = mmap_store->open(mapped); os_error != 0 || mapped.size == 0) {
        return fail(SPAC_E_IO, spac::os_message(path, "cannot be read from", os_error != 0 ? os_error : ENODATA));
    }
    probe.direct_error = direct_store->open(direct);
    probe.direct_align = probe.direct_error == 0 ? direct.align : 0;

    const auto pages = mmap_store->map(mapped, page, 0);
    probe.populates  = spac::populate_pages(pages.get(), 1) == 0;
    return SPAC_OK;
}

//
// products
//

template <typename T, void (*Free)(T)> struct Deleter {
    void operator()(T object) const { Free(object); }
};
using Context = std::unique_ptr<ggml_context, Deleter<ggml_context *, ggml_free>>;
using Buffer  = std::unique_ptr<ggml_backend_buffer, Deleter<ggml_backend_buffer_t, ggml_backend_buffer_free>>;
using Backend = std::unique_ptr<ggml_backend, Deleter<ggml_backend_t, ggml_backend_free>>;

// One row of normal noise, quantised, over and over: real weights for a kernel, made in no time.
std::vector<uint8_t> make_weights(const ggml_tensor & tensor) {
    std::mt19937 random(1);
    std::normal_distribution<float> noise(0.0f, 0.02f);
    std::vector<float> row(tensor.ne[0]), importance(tensor.ne[0], 1.0f);
    for (float & weight : row) {
        weight = noise(random);
    }
    const size_t row_bytes = ggml_row_size(tensor.type, tensor.ne[0]);
    std::vector<uint8_t> data(ggml_nbytes(&tensor));
    ggml_quantize_chunk(tensor.type, row.data(), data.data(), 0, 1, tensor.ne[0], importance.data());
    for (size_t at = row_bytes; at < data.size(); at += row_bytes) {
        std::memcpy(data.data() + at, data.data(), row_bytes);
    }
    return data;
}

// What computing loses for each byte that is read meanwhile: some rounds of `min_s`, half of each alone, half beside the reads.
template <typename Compute> int measure_contention(spac_products & test, const Compute & compute_s) {
    constexpr int n_rounds = 5;
    spac_reads    reads = *test.meanwhile;
    double        alone_s = 0, both_s = 0;
    int           n_alone = 0, n_both = 0;
    uint64_t      n_bytes = 0;
    for (int round = 0; round < n_rounds; ++round) {
        const auto compute_for_a_while = [&](double & total_s, int & n) {
            const auto start = Clock::now();
            do {
                total_s += compute_s();
                ++n;
            } while (seconds_since(start) < test.min_s / 2 / n_rounds);
        };
        compute_for_a_while(alone_s, n_alone);
        Endless          endless;
        std::atomic<int> status{ SPAC_OK };
        std::string      message;
        std::thread reader([&] {
            status = guarded([&] { return measure_reads(reads, &endless); });
            message = spac_last_error();
        });
        while (endless.n_bytes == 0 && status == SPAC_OK) {
            std::this_thread::yield();
        }
        const uint64_t before = endless.n_bytes;
        compute_for_a_while(both_s, n_both);
        n_bytes += endless.n_bytes - before;
        endless.stop = true;
        reader.join();
        if (status != SPAC_OK) {
            return fail(status, message);
        }
    }
    const double lost = 1 - (alone_s / n_alone) / (both_s / n_both);
    test.contention_s = n_bytes ? std::max(0.0, lost * both_s / (double) n_bytes) : 0.0;
    return SPAC_OK;
}

int measure_products(spac_products & test) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    Backend backend(cpu ? ggml_backend_dev_init(cpu, nullptr) : nullptr);
    if (!backend) {
        return fail(SPAC_E_BACKEND, "this llama.cpp has no CPU backend");
    }
    auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu),
                                                                                          "ggml_backend_set_n_threads");
    if (set_n_threads) {
        set_n_threads(backend.get(), test.n_threads);
    }
    const size_t overhead = ggml_tensor_overhead() * (size_t) (test.n_ops + 8) + ggml_graph_overhead_custom((size_t) test.n_ops + 8, false);
    Context weight_context(ggml_init({ overhead, nullptr, true })), context(ggml_init({ overhead, nullptr, true }));
    ggml_tensor * weights = ggml_new_tensor_3d(weight_context.get(), (ggml_type) test.type, test.n_columns, test.n_rows, test.n_experts);
    ggml_tensor * input   = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, test.n_columns, 1, test.n_tokens);
    ggml_tensor * ids     = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, test.n_experts, test.n_tokens);
    ggml_set_name(weights, "blk.0.ffn_up_exps.weight");
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), (size_t) test.n_ops + 8, false);
    for (int i = 0; i < test.n_ops; ++i) {
        ggml_build_forward_expand(graph, ggml_mul_mat_id(context.get(), weights, input, ids));
    }

    ggml_backend_buffer_type_t repack = test.repack ? spac::repack_buffer_type(cpu) : nullptr;
    Buffer weight_buffer;
    for (ggml_backend_buffer_type_t buft : { repack, ggml_backend_dev_buffer_type(cpu) }) {
        if (!buft) {
            continue;
        }
        weights->buffer = nullptr;
        weights->data   = nullptr;
        weights->extra  = nullptr;
        weight_buffer.reset(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, weights)));
        if (!weight_buffer) {
            return fail(SPAC_E_MEMORY, "no memory for the weights of a product");
        }
        ggml_backend_tensor_alloc(weight_buffer.get(), weights, ggml_backend_buffer_get_base(weight_buffer.get()));
        test.repacked = buft == repack && weights->extra;
        if (buft != repack || test.repacked) {
            break;  // else: this type has no other layout on this CPU
        }
    }
    Buffer buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_dev_buffer_type(cpu)));
    if (!buffer) {
        return fail(SPAC_E_MEMORY, "no memory for the results of a product");
    }

    const std::vector<uint8_t> data = make_weights(*weights);
    ggml_backend_tensor_set(weights, data.data(), 0, data.size());  // the first touches the pages
    auto begin = Clock::now();
    ggml_backend_tensor_set(weights, data.data(), 0, data.size());
    test.repack_s = test.repacked ? seconds_since(begin) : 0.0;
    const std::vector<float> ones((size_t) ggml_nelements(input), 1.0f);
    ggml_backend_tensor_set(input, ones.data(), 0, ggml_nbytes(input));
    std::vector<int32_t> chosen((size_t) ggml_nelements(ids));
    for (size_t i = 0; i < chosen.size(); ++i) {
        chosen[i] = (int32_t) (i % (size_t) test.n_experts);
    }
    ggml_backend_tensor_set(ids, chosen.data(), 0, ggml_nbytes(ids));

    if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {  // the first one wakes threads
        return fail(SPAC_E_BACKEND, "llama.cpp cannot compute this product");
    }
    const auto compute_s = [&] {
        const auto now = Clock::now();
        ggml_backend_graph_compute(backend.get(), graph);
        return seconds_since(now);
    };
    std::vector<double> times;
    const auto start = Clock::now();
    do {
        times.push_back(compute_s());
    } while (times.size() < 3 || seconds_since(start) < test.min_s);
    test.seconds = median(times) / test.n_ops;
    return test.meanwhile ? measure_contention(test, compute_s) : SPAC_OK;
}

//
// threads and memory
//

double median_wakeup_s(int n) {
    std::mutex              mutex;
    std::condition_variable changed;
    Clock::time_point       called, woke;
    int                     call = 0, answer = 0;
    std::thread sleeper([&] {
        std::unique_lock<std::mutex> lock(mutex);
        for (int i = 1; i <= n; ++i) {
            changed.wait(lock, [&] { return call == i; });
            woke   = Clock::now();
            answer = i;
            changed.notify_all();
        }
    });
    std::vector<double> times;
    for (int i = 1; i <= n; ++i) {
        std::this_thread::sleep_for(std::chrono::microseconds(500));  // the other core falls asleep, as while a slice is read
        std::unique_lock<std::mutex> lock(mutex);
        called = Clock::now();
        call   = i;
        changed.notify_all();
        changed.wait(lock, [&] { return answer == i; });
        times.push_back(std::chrono::duration<double>(woke - called).count());
    }
    sleeper.join();
    return median(times);
}

// The fastest of some rounds in which threads sum up memory that no cache holds.
double read_bandwidth(size_t n_bytes, int n_threads) {
    const size_t n_words = n_bytes / sizeof(uint64_t) / (size_t) n_threads;
    std::vector<uint64_t> memory(n_words * (size_t) n_threads, 1);
    std::vector<uint64_t> sums((size_t) n_threads * 8);
    double fastest = 0.0;
    for (int round = 0; round < 3; ++round) {
        std::vector<std::thread> threads;
        const auto begin = Clock::now();
        for (int t = 0; t < n_threads; ++t) {
            threads.emplace_back([&, t] {
                const uint64_t * words = memory.data() + (size_t) t * n_words;
                uint64_t         sum   = 0;
                for (size_t i = 0; i < n_words; ++i) {
                    sum += words[i];
                }
                sums[(size_t) t * 8] = sum;
            });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        fastest = std::max(fastest, (double) (n_words * (size_t) n_threads * sizeof(uint64_t)) / seconds_since(begin));
    }
    uint64_t all = 0;
    for (uint64_t sum : sums) {
        all += sum;
    }
    return all ? fastest : 0.0;  // so that nothing is optimised away
}

}  // namespace

int spac_stores_probe(const char * path, spac_probe * probe) {
    if (!probe || probe->struct_size != sizeof(spac_probe) || !path) {
        return fail(SPAC_E_ARGUMENT, "spac_stores_probe: no path, or struct_size does not match this libspac");
    }
    return guarded([&] { return probe_stores(path, *probe); });
}

int spac_reads_measure(spac_reads * test) {
    if (!can_be_read(test)) {
        return fail(SPAC_E_ARGUMENT, "spac_reads_measure: struct_size does not match this libspac, no path or reads, a depth below 1, or a store "
                                     "that does not read");
    }
    return guarded([&] { return measure_reads(*test); });
}

int spac_products_measure(spac_products * test) {
    if (!test || test->struct_size != sizeof(spac_products)) {
        return fail(SPAC_E_ARGUMENT, "spac_products_measure: struct_size does not match this libspac");
    }
    if (test->type < 0 || test->type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) test->type) == 0 || test->n_columns < 1 ||
        test->n_columns % ggml_blck_size((ggml_type) test->type) != 0 || test->n_rows < 1 || test->n_experts < 1 || test->n_tokens < 1 ||
        test->n_threads < 1 || test->n_threads > max_threads || test->n_ops < 1 || test->n_ops > 4096) {
        return fail(SPAC_E_ARGUMENT, "spac_products_measure: no such type, or a shape that it cannot have");
    }
    if (!ggml_get_type_traits((ggml_type) test->type)->to_float && test->type != GGML_TYPE_F32) {
        return fail(SPAC_E_ARGUMENT, "spac_products_measure: weights do not have this type");
    }
    if (test->meanwhile && !can_be_read(test->meanwhile)) {
        return fail(SPAC_E_ARGUMENT, "spac_products_measure: reads that cannot be");
    }
    test->repacked = 0;
    return guarded([&] { return measure_products(*test); });
}

int spac_wakeup_measure(int n, double * seconds) {
    if (n < 1 || !seconds) {
        return fail(SPAC_E_ARGUMENT, "spac_wakeup_measure: bad argument");
    }
    return guarded([&] {
        *seconds = median_wakeup_s(n);
        return SPAC_OK;
    });
}

int spac_bandwidth_measure(uint64_t n_bytes, int n_threads, double * bytes_per_s) {
    if (n_threads < 1 || n_threads > max_threads || n_bytes < (uint64_t) n_threads * 4096 || !bytes_per_s) {
        return fail(SPAC_E_ARGUMENT, "spac_bandwidth_measure: bad argument");
    }
    return guarded([&] {
        *bytes_per_s = read_bandwidth(n_bytes, n_threads);
        return SPAC_OK;
    });
}
