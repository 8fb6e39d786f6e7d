// What the native tests share: model files with known bytes, a store that can be looked into, and ops as ggml runs them.
//
// Nothing here sleeps. With n_io_threads = 0 a read happens when the test says so, and TestStore::on_read runs while it is in flight.
#pragma once

#include "pager.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <new>
#include <random>

#include <sys/mman.h>
#include <unistd.h>

namespace spac::testing {

// A file with bytes that differ from place to place, none of them zero: a page that was dropped does not look like the file.
struct TempFile {
    std::string          path = std::filesystem::temp_directory_path() / "spac-test-XXXXXX";
    std::vector<uint8_t> bytes;

    explicit TempFile(size_t size) : bytes(size) {
        for (size_t i = 0; i < size; ++i) {
            bytes[i] = (uint8_t) (1 + ((uint64_t) i * 0x9E3779B97F4A7C15ull >> 40) % 255);
        }
        const int fd = mkstemp(path.data());
        REQUIRE(fd >= 0);
        REQUIRE(write(fd, bytes.data(), size) == (ssize_t) size);
        REQUIRE(fsync(fd) == 0);  // dirty pages cannot be dropped
        close(fd);
    }
    TempFile(const TempFile &) = delete;
    ~TempFile() { unlink(path.c_str()); }
};

// In pages that hold anything, of whole ones.
inline uint64_t bytes_in_memory(const uint8_t * pages, size_t n_bytes) {
    const size_t n = page_size() / kernel_page_size();
    std::vector<unsigned char> found(n_bytes / kernel_page_size());
    REQUIRE(mincore((void *) pages, n_bytes, found.data()) == 0);
    uint64_t bytes = 0;
    for (auto page = found.begin(); page != found.end(); page += (ptrdiff_t) n) {
        bytes += std::any_of(page, page + (ptrdiff_t) n, [](unsigned char flags) { return flags & 1; }) ? page_size() : 0;
    }
    return bytes;
}

// Where [offset, offset + length) of a file can be read to: where its store has mapped it, or pages between two guard pages, congruent
// with it.
struct Place {
    uint8_t * pages;
    size_t    n_bytes;  // of pages
    uint8_t * data;

    Place(const Store & store, const ModelFile & file, size_t length, uint64_t offset) {
        const size_t page = page_size();
        n_bytes = (offset % page + length + page - 1) / page * page;
        if (store.maps()) {
            mapping_ = store.map(file, length, offset);
            data     = mapping_.get();
            pages    = data - offset % page;
            return;
        }
        n_mapped_ = n_bytes + 3 * page;  // the kernel's pages may be smaller, and what it gives less aligned
        mapped_   = mmap(nullptr, n_mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        REQUIRE(mapped_ != MAP_FAILED);
        pages = (uint8_t *) (((uintptr_t) mapped_ + 2 * page - 1) / page * page);
        data  = pages + offset % page;
        REQUIRE(mprotect(pages, n_bytes, PROT_READ | PROT_WRITE) == 0);
    }
    Place(const Place &) = delete;
    ~Place() {
        if (n_mapped_ > 0) {
            munmap(mapped_, n_mapped_);
        }
    }

  private:
    std::shared_ptr<uint8_t> mapping_;
    void * mapped_   = nullptr;
    size_t n_mapped_ = 0;
};

// A real store, with what tests want to see and to decide.
class TestStore : public Store {
  public:
    std::function<void()> on_read;                          // set before there are threads
    std::atomic<uint64_t> bad_offset{ (uint64_t) -1 };      // the read that begins here fails with EIO
    std::atomic<int>      bad_every{ 0 };                   // n > 0: so does every n-th read
    bool                  no_room = false;                  // no address space for a mapping

    explicit TestStore(std::unique_ptr<Store> inner) : inner_(std::move(inner)) {}

    int id() const override { return inner_->id(); }
    int open(ModelFile & file) const override { return inner_->open(file); }
    bool maps() const override { return inner_->maps(); }
    std::shared_ptr<uint8_t> map(const ModelFile & file, size_t length, uint64_t offset) const override {
        if (no_room) {
            throw std::bad_alloc();
        }
        return inner_->map(file, length, offset);
    }
    ReadResult read_in_place(const ModelFile & file, void * address, size_t length, uint64_t offset) override {
        size_t n_reads;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            offsets_.push_back(offset);
            n_reads = offsets_.size();
        }
        if (on_read) {
            on_read();
        }
        if (offset == bad_offset || (bad_every > 0 && n_reads % bad_every == 0)) {
            return { EIO, 0 };
        }
        return inner_->read(file, address, length, offset);
    }
    void drop(const ModelFile & file, void * address, size_t length, uint64_t offset) const override {
        inner_->drop(file, address, length, offset);
    }

    std::vector<uint64_t> offsets() const {
        std::lock_guard<std::mutex> lock(mutex_);
        return offsets_;
    }

  private:
    std::unique_ptr<Store> inner_;
    mutable std::mutex     mutex_;
    std::vector<uint64_t>  offsets_;
};

// By default slices are whole pages, so that a budget can be counted in slices.
struct Shape {
    int      n_layers = 2, n_parts = 2, n_experts = 8;
    size_t   slice_bytes = 2 * page_size();
    uint64_t offset      = page_size();
    int      store       = SPAC_STORE_MOCK;
    bool     arranged    = true;

    uint64_t bytes() const { return (uint64_t) n_layers * n_parts * n_experts * slice_bytes; }
};

constexpr int first_layer = 3;  // a model's first layers may have no experts

// A model of one file whose tensors lie there one after another. Outlives the pagers that it is added to.
struct TestModel {
    TempFile               file;
    std::shared_ptr<Model> model = std::make_shared<Model>();
    TestStore *            store = nullptr;

    explicit TestModel(const Shape & shape = {}) : file(shape.offset + shape.bytes()) {
        int  os_error = 0;
        auto inner    = open_store(shape.store, file.path, os_error);
        REQUIRE(inner);
        store = new TestStore(std::move(inner));
        model->store.reset(store);
        model->files.push_back(std::make_unique<ModelFile>());
        ModelFile & opened = *model->files.back();
        opened.path        = file.path;
        REQUIRE(store->open(opened) == 0);
        uint64_t offset = shape.offset;
        for (int layer = 0; layer < shape.n_layers; ++layer) {
            model->groups.push_back(std::make_unique<Group>());
            model->groups.back()->layer = first_layer + layer;
            model->groups.back()->key   = 2 * layer;
            for (int part = 0; part < shape.n_parts; ++part) {
                const uint64_t bytes = shape.n_experts * shape.slice_bytes;
                auto tensor         = std::make_unique<PagedTensor>();
                tensor->group       = model->groups.back().get();
                tensor->rank        = part + 1 == shape.n_parts ? 1 : 0;
                tensor->n_experts   = shape.n_experts;
                tensor->slice_bytes = shape.slice_bytes;
                tensor->file        = &opened;
                tensor->offset      = offset;
                model->tensors.push_back(std::move(tensor));
                offset += bytes;
            }
        }
        if (shape.arranged) {
            model->arrange();
        }
    }

    PagedTensor & tensor(int layer, int part) { return *model->groups[layer]->parts[part]; }
    State         state(int layer, int part, int expert) { return tensor(layer, part).slices[expert].state; }
    bool          resident(int layer, int expert) {  // the whole bundle
        const auto & parts = model->groups[layer]->parts;
        return std::all_of(parts.begin(), parts.end(), [&](auto * part) { return part->slices[expert].state == State::resident; });
    }
    bool intact(const PagedTensor & tensor, int expert) const {
        return std::memcmp(tensor.slice_data(expert), &file.bytes[tensor.slice_offset(expert)], tensor.slice_bytes) == 0;
    }
    // The experts of all reads so far.
    std::vector<int> experts_read() const {
        std::vector<int> experts;
        for (uint64_t offset : store->offsets()) {
            for (const auto & tensor : model->tensors) {
                if (offset >= tensor->offset && offset < tensor->slice_offset(tensor->n_experts)) {
                    experts.push_back((int) ((offset - tensor->offset) / tensor->slice_bytes));
                }
            }
        }
        return experts;
    }
    int prefetch(Pager & pager, int layer, int expert, float utility = 1, int deadline = 0) {
        const spac_bundle bundle = { first_layer + layer, expert, deadline, utility };
        return pager.prefetch(*model, &bundle, 1);
    }

    // The next token will use these experts of a layer, with this probability; nothing else is known.
    int foresee(Pager & pager, int layer, const std::vector<int> & experts, float now = 1) {
        std::vector<float> chances((size_t) model->n_bundles(), 0), later(chances), rest(chances.size(), 1);
        int first = 0;
        for (int i = 0; i < layer; ++i) {
            first += model->groups[i]->n_experts;
        }
        for (int e : experts) {
            chances[(size_t) (first + e)] = now;
        }
        return pager.foresee(*model, { chances.data(), later.data(), rest.data(), 0.9f });
    }
};

// A context that is known to a pager.
struct Context : spac_context {
    explicit Context(Pager & pager) : pager_(pager) { pager.add_context(this); }
    ~Context() { pager_.remove_context(this); }

  private:
    Pager & pager_;
};

using Tokens = std::vector<std::vector<int32_t>>;  // [token]: its experts

struct Walk {
    Op *             op = nullptr;
    std::vector<int> order;  // of the experts that have rows
};

inline Walk begin(Pager & pager, PagedTensor & tensor, spac_context * context, const Tokens & tokens, int n_threads = 1) {
    const size_t n_used = tokens.at(0).size(), stride = n_used + 3;  // ids are a view into wider rows
    std::vector<int32_t> ids(tokens.size() * stride, -1), order(tensor.n_experts);
    std::vector<int64_t> row_counts(tensor.n_experts);
    for (size_t t = 0; t < tokens.size(); ++t) {
        for (size_t i = 0; i < n_used; ++i) {
            ids[t * stride + i] = tokens[t][i];
            ++row_counts[tokens[t][i]];
        }
    }
    Walk walk;
    walk.op = pager.begin_op(tensor, context, row_counts.data(), order.data(), n_threads,
                             { (const char *) ids.data(), (int64_t) tokens.size(), (int) n_used, 4 * stride, 4 });
    for (int32_t e : order) {
        if (row_counts[e] > 0) {
            walk.order.push_back(e);
        }
    }
    return walk;
}

//
// by hand, on one thread
//

inline bool read_one(Pager & pager) {
    const bool ran = pager.run_one_read();
    CHECK(pager.used_bytes() <= pager.budget());
    return ran;
}

inline int read_all(Pager & pager) {
    int n = 0;
    while (read_one(pager)) {
        ++n;
    }
    return n;
}

// A thread's turn at an expert, with the reads that it waits for; false: told to skip it.
inline bool use(Pager & pager, const TestModel & m, Op & op, int expert) {
    PagedTensor &  tensor  = *op.tensor;
    spac_context & context = *op.context;
    Slice &        slice   = tensor.slices[expert];
    while (!context.stopped && slice.state == State::queued && read_one(pager)) {
    }
    bool here = false;
    if (context.stopped || slice.state == State::resident || slice.state == State::failed) {
        here = pager.begin_expert(op, expert);
    } else {  // evicted again: only a thread that waits asks for it once more
        std::atomic<bool> done{ false };
        std::thread thread([&] {
            here = pager.begin_expert(op, expert);
            done = true;
        });
        const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(10);  // a deadlock should be a failure
        while (!done) {
            if (!pager.run_one_read()) {
                std::this_thread::yield();
            }
            if (std::chrono::steady_clock::now() > give_up && !context.stopped) {
                FAIL_CHECK("nobody reads expert " << expert << ", which a thread waits for");
                context.stop(SPAC_E_CANCELLED, 0, "", 0, 0);
                pager.wake();
            }
        }
        thread.join();
        CHECK(pager.used_bytes() <= pager.budget());
    }
    if (here) {
        CHECK(m.intact(tensor, expert));
        pager.end_expert(op, expert);
    }
    return here;
}

// All layers.
inline void pass(Pager & pager, TestModel & m, spac_context * context, const Tokens & tokens) {
    for (auto & group : m.model->groups) {
        for (PagedTensor * tensor : group->parts) {
            Walk walk = begin(pager, *tensor, context, tokens);
            for (int e : walk.order) {
                CHECK(use(pager, m, *walk.op, e));
            }
        }
    }
}

// While nothing runs: is used_bytes what the present slices' slots come to, counted one by one, and what the kernel holds no more than
// that, and no less than the pages that they touch?
inline void check_accounts(const Pager & pager, std::initializer_list<const TestModel *> models) {
    uint64_t total = 0;
    for (const TestModel * m : models) {
        uint64_t bytes = 0, touched = 0, in_memory = 0;
        for (const auto & tensor : m->model->tensors) {
            for (int e = 0; e < tensor->n_experts; ++e) {
                CHECK((tensor->slices[e].slot != nullptr) == (tensor->present(e) && tensor->slots));
                bytes += tensor->present(e) ? tensor->slot_bytes : 0;
                touched += tensor->present(e) ? tensor->page_bytes(e) : 0;
            }
        }
        CHECK(m->model->used_bytes == bytes);
        for (const auto & [slice_bytes, pool] : m->model->pools) {
            in_memory += pool ? bytes_in_memory(pool->begin(), pool->size()) : touched;
        }
        CHECK(in_memory <= bytes);
        CHECK(in_memory >= touched);
        total += bytes;
    }
    CHECK(pager.used_bytes() == total);
    CHECK(total <= pager.budget());
    CHECK(pager.used_bytes() <= pager.peak_bytes());
}

// No op and no context left: nobody holds or expects anything.
inline void check_quiet(const TestModel & m) {
    for (const auto & tensor : m.model->tensors) {
        for (int e = 0; e < tensor->n_experts; ++e) {
            CHECK(tensor->slices[e].users == 0);
            CHECK(tensor->slices[e].upcoming == 0);
            CHECK(tensor->slices[e].op == nullptr);
        }
    }
}

//
// on compute threads
//

struct Outcome {
    int              n_wrong = 0;  // experts whose bytes were not the file's
    std::vector<int> skipped;      // [expert]: threads that were told to skip it
    int              n_skipped = 0;
};

// One op as ggml runs it: begun by the caller, walked by all threads. The reads are others' business.
inline Outcome compute(Pager & pager, const TestModel & m, PagedTensor & tensor, spac_context * context, const Tokens & tokens,
                       int n_threads) {
    Walk                          walk = begin(pager, tensor, context, tokens, n_threads);
    std::atomic<int>              n_wrong{ 0 };
    std::vector<std::atomic<int>> skipped(tensor.n_experts);
    const auto walk_experts = [&] {
        for (int e : walk.order) {
            if (!pager.begin_expert(*walk.op, e)) {
                ++skipped[e];
                continue;
            }
            n_wrong += m.intact(tensor, e) ? 0 : 1;
            pager.end_expert(*walk.op, e);
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < n_threads; ++i) {
        threads.emplace_back(walk_experts);
    }
    walk_experts();
    for (auto & thread : threads) {
        thread.join();
    }
    Outcome outcome;
    outcome.n_wrong = n_wrong;
    for (auto & count : skipped) {
        outcome.skipped.push_back(count);
        outcome.n_skipped += count;
    }
    return outcome;
}

inline Tokens random_tokens(std::mt19937 & random, int n_tokens, int n_used, int n_experts) {
    Tokens           tokens;
    std::vector<int> experts(n_experts);
    for (int e = 0; e < n_experts; ++e) {
        experts[e] = e;
    }
    for (int t = 0; t < n_tokens; ++t) {
        std::shuffle(experts.begin(), experts.end(), random);
        tokens.emplace_back(experts.begin(), experts.begin() + n_used);
    }
    return tokens;
}

}  // namespace spac::testing
