// What a layer takes when experts of it are missing: the pager itself, with its reading threads and as many compute threads as
// decoding has, over a file of anything. What the experts would compute is left out.
#include "include/spac.h"

#include "error.h"
#include "pager.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <random>
#include <thread>

using spac::fail;
using spac::guarded;

namespace {

using Clock = std::chrono::steady_clock;

constexpr int n_parts     = 3;    // gate, up, down
constexpr int max_experts = 256;  // of the layer
constexpr int max_threads = 1024;

// Makes the model of one layer whose tensors lie in the file one after another. SPAC_OK or SPAC_E_*.
int open_layer(spac::Model & model, const spac_visits & test) {
    int os_error = 0;
    model.store = spac::open_store(test.store, test.path, os_error);
    model.files.push_back(std::make_unique<spac::ModelFile>());
    spac::ModelFile & file = *model.files.back();
    file.path = test.path;
    if (!model.store || (os_error = model.store->open(file)) != 0) {
        return fail(SPAC_E_IO, spac::os_message(test.path, "cannot be read from", os_error));
    }
    const int n_experts = (int) std::min<uint64_t>(file.size / n_parts / test.slice_bytes, max_experts);
    if (n_experts < 3 * test.n_missing) {
        return fail(SPAC_E_ARGUMENT, std::string(test.path) + ": too small for visits of so many experts of this size");
    }
    model.groups.push_back(std::make_unique<spac::Group>());
    for (int part = 0; part < n_parts; ++part) {
        auto tensor         = std::make_unique<spac::PagedTensor>();
        tensor->group       = model.groups.back().get();
        tensor->rank        = part + 1 == n_parts ? 1 : 0;
        tensor->n_experts   = n_experts;
        tensor->slice_bytes = test.slice_bytes;
        tensor->file        = &file;
        tensor->offset      = (uint64_t) part * (uint64_t) n_experts * test.slice_bytes;
        model.tensors.push_back(std::move(tensor));
    }
    model.arrange();
    return SPAC_OK;
}

// The other compute threads: they go through the experts of each op that is begun, and wait for the next one without sleeping.
class Team {
  public:
    Team(spac::Pager & pager, int n_threads) : pager_(pager) {
        try {
            for (int i = 1; i < n_threads; ++i) {
                threads_.emplace_back([this] { follow(); });
            }
        } catch (...) {
            end();
            throw;
        }
    }
    Team(const Team &) = delete;
    Team & operator=(const Team &) = delete;
    ~Team() { end(); }

    // With the caller as one of them.
    void walk(spac::Op & op, const int32_t * experts, int n) {
        op_      = &op;
        experts_ = experts;
        n_       = n;
        n_done_.store(0, std::memory_order_relaxed);
        n_begun_.fetch_add(1, std::memory_order_release);
        visit();
        while (n_done_.load(std::memory_order_acquire) < (int) threads_.size()) {
            std::this_thread::yield();
        }
    }

  private:
    void end() {
        op_ = nullptr;
        n_begun_.fetch_add(1, std::memory_order_release);
        for (std::thread & thread : threads_) {
            thread.join();
        }
    }
    void visit() {
        for (int i = 0; i < n_; ++i) {
            if (pager_.begin_expert(*op_, experts_[i])) {
                pager_.end_expert(*op_, experts_[i]);
            }
        }
    }
    void follow() {
        for (int next = 1;; ++next) {
            while (n_begun_.load(std::memory_order_acquire) < next) {
                std::this_thread::yield();
            }
            if (!op_) {
                return;
            }
            visit();
            n_done_.fetch_add(1, std::memory_order_release);
        }
    }

    spac::Pager &            pager_;
    spac::Op *               op_      = nullptr;
    const int32_t *          experts_ = nullptr;
    int                      n_       = 0;
    std::atomic<int>         n_begun_{ 0 }, n_done_{ 0 };
    std::vector<std::thread> threads_;
};

int measure_visits(spac_visits & test) {
    const auto layer = std::make_shared<spac::Model>();
    spac::Model & model = *layer;
    if (const int code = open_layer(model, test); code != SPAC_OK) {
        return code;
    }
    spac::Pager   pager(model.floor_bytes() + (uint64_t) test.n_missing * model.max_bundle_bytes);
    pager.add_model(layer, test.n_io_threads);
    {
        Team team(pager, test.n_threads);
        // each expert's turn comes when the others have had theirs, so that it is not in memory any more
        std::vector<int32_t> turns((size_t) model.n_experts), chosen((size_t) test.n_missing), order((size_t) model.n_experts);
        std::iota(turns.begin(), turns.end(), 0);
        std::shuffle(turns.begin(), turns.end(), std::mt19937(1));
        size_t at = 0;
        for (int i = 0; i < test.n_visits; ++i) {
            std::vector<int64_t> row_counts(order.size());
            for (int32_t & expert : chosen) {
                expert = turns[at++ % turns.size()];
                row_counts[(size_t) expert] = 1;
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(1));  // as between two layers: readers sleep, the disk has nothing to do
            const auto begin = Clock::now();
            for (auto & part : model.tensors) {
                spac::Op * op = pager.begin_op(*part, nullptr, row_counts.data(), order.data(), test.n_threads,
                                               { (const char *) chosen.data(), 1, test.n_missing, 4 * chosen.size(), 4 });
                team.walk(*op, order.data(), test.n_missing);
            }
            test.seconds[i] = std::chrono::duration<double>(Clock::now() - begin).count();
            if (model.default_context.stopped) {
                break;
            }
        }
    }
    const bool stopped = model.default_context.stopped;
    pager.remove_model(model);
    return stopped ? fail(SPAC_E_IO, std::string(test.path) + ": cannot be read") : SPAC_OK;
}

}  // namespace

int spac_visits_measure(spac_visits * test) {
    if (!test || test->struct_size != sizeof(spac_visits)) {
        return fail(SPAC_E_ARGUMENT, "spac_visits_measure: struct_size does not match this libspac");
    }
    if (!test->path || !test->seconds || test->slice_bytes < 1 || test->n_missing < 1 || test->n_missing > max_experts ||
        test->n_visits < 1 || test->n_threads < 1 || test->n_threads > max_threads || test->n_io_threads < 1 ||
        test->n_io_threads > max_threads) {
        return fail(SPAC_E_ARGUMENT, "spac_visits_measure: no path, or a number below 1");
    }
    return guarded([&] { return measure_visits(*test); });
}
