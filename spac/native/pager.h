// The pager: which slices are in memory, under a hard budget of pages, and in which order they are read and evicted.
//
// Invariants
//  1. used_bytes counts every page of a present slice's slot, reads in flight included, and never exceeds the budget.
//  2. A slice with users > 0 is resident and stays. A compute thread adds itself to users before it looks at state; the
//     evictor sets state to absent before it looks at users: one of the two sees the other. Likewise whoever finds all in use sets
//     starving_ before it looks once more and sleeps, and a compute thread leaves users before it looks at starving_.
//  3. An op's head (the first expert that not all of its threads have left) is never evicted once it is resident, and may
//     evict anything that is neither in use nor another op's head. So every op advances with room for one slice, and ops
//     cannot wait for each other in a circle.
//  4. A slice is in the queue exactly while its state is queued; what an op queued leaves the queue with the op or its visit.
//
// Threads: begin_expert/end_expert run on the compute threads and take no lock on a hit but the last thread's; all else takes
// the one mutex. Reads run on the pager's own threads without it. With n_io_threads = 0 nothing runs by itself: tests call
// run_one_read().
#pragma once

#include "context.h"
#include "events.h"
#include "policy.h"
#include "slot.h"

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <unordered_set>
#include <vector>

namespace spac {

// An expert's slices in one layer: the unit of policy.
struct Bundle {
    Group * group     = nullptr;
    int     expert    = 0;
    int     n_present = 0;  // slices
};

struct Model;

// The paged tensors of one layer whose experts are chosen together.
struct Group {
    int                        layer = 0;
    int                        key   = 0;  // orders groups: layers, and sets of experts within a layer
    int                        index = 0;  // in model->groups
    int                        n_experts = 0;
    std::vector<PagedTensor *> parts;
    std::vector<Bundle>        bundles;
    std::atomic<uint64_t>      hits{ 0 }, misses{ 0 };
};

struct Model {
    int id = 0;
    int unusable = 0;  // SPAC_E_*: why its load failed; decoding says so
    std::unique_ptr<Store>                    store;
    std::vector<std::unique_ptr<ModelFile>>   files;
    std::vector<std::unique_ptr<PagedTensor>> tensors;
    std::vector<std::unique_ptr<Group>>       groups;  // in the order of layers
    std::map<size_t, std::unique_ptr<SlotPool>> pools;  // by slice_bytes
    std::unique_ptr<Policy>                   policy;  // its layers are groups
    uint64_t expert_bytes = 0, expert_page_bytes = 0, max_bundle_bytes = 0;
    int      n_experts = 0;

    EventRing    events{ 8192 };
    spac_context default_context;  // for a llama_context that was given none

    std::atomic<uint64_t> used_bytes{ 0 }, hits{ 0 }, misses{ 0 }, reads{ 0 }, bytes_read{ 0 }, evictions{ 0 }, rereads{ 0 };
    std::atomic<uint64_t> read_errors{ 0 }, stall_ns{ 0 }, read_ns{ 0 }, tokens{ 0 }, ubatches{ 0 };
    std::atomic<uint64_t> ahead_reads{ 0 }, ahead_bytes{ 0 }, wasted_bytes{ 0 };

    // Two bundles of the largest layer: one in use, one on its way.
    uint64_t floor_bytes() const { return 2 * max_bundle_bytes; }

    int n_bundles() const {
        return std::accumulate(groups.begin(), groups.end(), 0, [](int n, const auto & group) { return n + group->n_experts; });
    }

    // Sorts tensors into groups, computes the sizes and reserves the slots; before the model is added to a pager. Throws if there is no
    // address space for them: then it may be added and removed all the same, but nothing of it can be read.
    void arrange();

  private:
    void reserve();
};

// The experts that an op's rows were routed to: ids[token * token_stride + i * expert_stride], strides in bytes.
struct Routing {
    const char * ids           = nullptr;
    int64_t      n_tokens      = 0;
    int          n_used        = 0;
    size_t       token_stride  = 0;
    size_t       expert_stride = 0;

    int32_t at(int64_t token, int i) const { return *(const int32_t *) (ids + token * token_stride + i * expert_stride); }
};

// What somebody else knows of coming tokens: see Policy::foresee(). All [group][expert].
struct Foresight {
    const float * now;
    const float * later;
    const float * rest;
    float         read_from;  // what is at least so probable now is read ahead
};

// One MUL_MAT_ID being computed.
struct Op {
    PagedTensor *   tensor = nullptr;
    spac_context *  context = nullptr;
    int             n_threads = 0;
    std::thread::id owner;                                // the thread whose waiting is counted as stall
    std::vector<int32_t> needed;                          // experts, in the order of use
    std::vector<int32_t> position;                        // [expert]: index in needed, or -1
    std::vector<std::unique_ptr<std::atomic<int>>> left;  // [position]: threads that are done with it
    size_t          head = 0;                             // the first position that not all threads have left
    size_t          n_done = 0;
};

class Pager {
  public:
    explicit Pager(uint64_t budget_bytes) : granted_(budget_bytes), budget_(budget_bytes) {}
    ~Pager();

    // -- set-up --
    void add_model(std::shared_ptr<Model> model, int n_io_threads);
    void remove_model(Model & model);  // waits for its reads in flight
    void halt();                       // the same for all models' reads; none begins until another model is added
    void add_context(spac_context * context);
    void remove_context(spac_context * context);
    int  take_error(spac_context & context, spac_error & error);  // and forget the layer in which it stopped
    int  set_budget(uint64_t bytes);  // SPAC_OK or SPAC_E_BUDGET
    void set_cap(uint64_t bytes);     // use no more of the budget than this, but what the models need at least
    uint64_t budget() const { return budget_.load(std::memory_order_relaxed); }  // what may be used now
    uint64_t granted() const { return granted_.load(std::memory_order_relaxed); }  // what was set
    uint64_t used_bytes() const { return used_.load(std::memory_order_relaxed); }
    uint64_t peak_bytes() const { return peak_.load(std::memory_order_relaxed); }

    // -- compute threads --
    // order [n_experts]: permuted, what is resident first. The op belongs to the pager and ends by itself when all threads
    // have left (or skipped) all of its experts.
    Op * begin_op(PagedTensor & tensor, spac_context * context, const int64_t * row_counts, int32_t * order, int n_threads,
                  const Routing & routing);
    const void * begin_expert(Op & op, int expert);  // its slice, until end_expert(); null: skip it
    void end_expert(Op & op, int expert);

    // -- control --
    int  prefetch(Model & model, const spac_bundle * bundles, int n);
    int  foresee(Model & model, const Foresight & foresight);
    int  evict_all(Model & model);
    void wake();  // after a context was stopped

    // Reads the first slice of the queue that has room; false if there is none. For pagers without threads of their own.
    bool run_one_read();

  private:
    struct Job {
        int           deadline;
        double        rank;
        PagedTensor * tensor;
        int           expert;
        bool ahead() const;  // a prefetch, not a demand
        bool operator<(const Job & other) const {
            if (deadline != other.deadline) { return deadline < other.deadline; }
            if (rank != other.rank) { return rank < other.rank; }
            if (tensor != other.tensor) { return tensor < other.tensor; }
            return expert < other.expert;
        }
    };
    struct Victim {
        PagedTensor * tensor = nullptr;
        int           expert = 0;
        double        score  = 0;
    };
    // What a search for a job learned about the room that there is.
    struct Refusal {
        bool   full    = false;
        bool   nothing = false;  // nothing can be evicted that no op will use
        double score   = 0;      // the cheapest such slice's
    };
    // How much a read may push out, by what waits for it.
    enum class Claim { worth_less, not_upcoming, anything_idle };

    using Lock = std::unique_lock<std::mutex>;

    // layers and their experts
    void begin_visit(PagedTensor & tensor, spac_context & context, const std::vector<int32_t> & needed, const Routing & routing);
    void begin_ubatch(Model & model, spac_context & context, const Routing & routing);
    void count_uses(Group & group, uint64_t end_token, const std::vector<int32_t> & needed, const Routing & routing);
    void end_visit(spac_context & context);
    void close_upcoming(spac_context & context, PagedTensor & tensor, int expert);
    void leave(Op & op, int expert);
    void let_go(Slice & slice);
    void finish_op(Op & op);

    // the queue
    void enqueue(PagedTensor & tensor, int expert, int deadline, double rank, Op * op, bool guess = false);
    void dequeue(PagedTensor & tensor, int expert);
    bool take_job(Job & job);
    bool take_piece(Job & job, int & piece);
    void read(const Job & job, int piece, Lock & lock);
    void drop_guesses(Group & group, const std::vector<int32_t> & needed);
    void drop_reads(Model & model, Lock & lock);  // those in flight end
    void stop_threads();
    bool serves(const Model & model) const;
    Claim claim(const Job & job) const;
    void read_piece(const Job & job, int piece, Lock & lock);
    void finish_read(const Job & job);
    void work();
    void notify_work();

    // room
    uint64_t floor() const;
    uint64_t usable() const;
    void follow_budget(Lock & lock);
    bool make_room(const Job & job, Claim claim, Refusal & refusal);
    bool idle(PagedTensor & tensor, int expert) const;
    bool is_head(const PagedTensor & tensor, int expert) const;
    double worth(const PagedTensor & tensor, int expert) const;
    bool droppable(PagedTensor & tensor, int expert) const;
    void count_present(Bundle & bundle, int change);
    Victim cheapest(const PagedTensor * heir = nullptr) const;  // among slices that no op will use, one with a slot for the heir before another
    Victim spare_upcoming(const Op * op) const;  // among the others: for a head, or when the budget shrinks
    bool evict(PagedTensor & tensor, int expert, const Job * heir = nullptr);
    void release(PagedTensor & tensor, int expert, const Job * heir = nullptr);

    std::mutex              setup_mutex_;  // held over add_model(), remove_model() and halt(), before mutex_
    std::mutex              mutex_;
    std::condition_variable work_;     // reading threads: a job, room, or the end
    std::condition_variable arrived_;  // compute threads and removers: a slice changed its state
    std::atomic<uint64_t>   granted_, budget_, used_{ 0 }, peak_{ 0 };
    uint64_t                cap_ = UINT64_MAX;
    std::set<Job>           queue_;
    std::optional<Job>      open_;     // being read, and nobody has begun its last pieces
    std::vector<std::shared_ptr<Model>>      models_;
    std::unordered_set<spac_context *>       contexts_;
    std::vector<Op *>                        ops_;       // active
    std::vector<std::unique_ptr<Op>>         all_ops_;   // active and free
    std::vector<Op *>                        free_ops_;
    std::vector<std::thread>                 threads_;
    int    n_reading_ = 0, n_reading_ahead_ = 0;  // demands and guesses in flight
    bool   stopping_ = false;
    int    n_idle_threads_ = 0;
    std::atomic<bool> starving_{ false };  // somebody sleeps for room, and all there is was in use
};

}  // namespace spac
