// The reading side of the pager: the queue, the room in the budget, the reads.
#include "pager.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <new>

namespace spac {

// A layer's certain reads this close to the front may push out whatever no op will use; those farther ahead only what is
// worth less, so that a long prompt streams through without wiping out what decoding will want again.
static constexpr double near_head = 8;

// Deadlines: 0 the op being computed, 1 and 2 its layer's other tensors, then prefetches.
static constexpr int prefetch_deadline = 3;
static constexpr int latest_deadline   = 1 << 20;  // of those

bool Pager::Job::ahead() const {
    return deadline >= prefetch_deadline;
}

// A prefetch begins only while no demand is being read, and only so many at a time: what a demand that comes in between has to
// share the device with.
static constexpr int max_reading_ahead = 2;

//
// the queue
//

// Puts an absent slice into the queue, or a queued one nearer its front; a guess moves only guesses. A layer's tensors may differ
// in their number of experts: what a tensor does not have is not queued.
void Pager::enqueue(PagedTensor & tensor, int expert, int deadline, double rank, Op * op, bool guess) {
    if (expert >= tensor.n_experts) {
        return;
    }
    Slice & slice = tensor.slices[expert];
    const State state = slice.state;
    if (state == State::queued) {
        if ((guess && !slice.guess) || slice.deadline < deadline || (slice.deadline == deadline && slice.rank <= rank)) {
            return;
        }
        dequeue(tensor, expert);
    } else if (state != State::absent) {
        return;
    }
    slice.deadline = deadline;
    slice.guess    = guess;
    slice.rank     = rank;
    slice.op       = op;
    slice.state    = State::queued;
    queue_.insert({ deadline, rank, &tensor, expert });
}

void Pager::dequeue(PagedTensor & tensor, int expert) {
    Slice & slice = tensor.slices[expert];
    queue_.erase({ slice.deadline, slice.rank, &tensor, expert });
    slice.op    = nullptr;
    slice.state = State::absent;
}

Pager::Claim Pager::claim(const Job & job) const {
    const Op * op = job.tensor->slices[job.expert].op;
    if (is_head(*job.tensor, job.expert)) {
        return Claim::anything_idle;
    }
    const double ahead = job.rank - (op ? (double) op->head : 0);
    return !job.ahead() && ahead < near_head ? Claim::not_upcoming : Claim::worth_less;
}

// Takes the first job that there is room for and makes the room. One without room holds up none behind it: the order is by
// deadline first, and what comes later may be worth more.
bool Pager::take_job(Job & job) {
    Refusal refusal;
    bool    demanded = false;
    for (const Job & candidate : queue_) {
        const bool ahead = candidate.ahead();
        if (ahead && (n_reading_ > 0 || n_reading_ahead_ >= max_reading_ahead || demanded)) {
            return false;  // all behind it are prefetches, too
        }
        demanded = demanded || !ahead;
        if (make_room(candidate, claim(candidate), refusal)) {
            job = candidate;
            Slice & slice = job.tensor->slices[job.expert];
            queue_.erase(job);
            slice.op    = nullptr;
            slice.state = State::reading;
            slice.abandoned = false;
            slice.retry    = false;
            slice.os_error = 0;
            slice.n_begun  = 0;
            slice.n_inside = 0;
            ++(ahead ? n_reading_ahead_ : n_reading_);
            count_present(job.tensor->group->bundles[job.expert], 1);
            used_ += job.tensor->slot_bytes;
            job.tensor->model->used_bytes += job.tensor->slot_bytes;
            job.tensor->occupy(job.expert);
            if (used_ > peak_) {
                peak_ = used_.load();
            }
            return true;
        }
    }
    return false;
}

// Several threads read the pieces of one slice, so that the first one wanted is here first, and the last one does not come
// through one thread alone. A guess is read by one thread, unless its layer chooses it meanwhile.
bool Pager::take_piece(Job & job, int & piece) {
    if (open_) {
        job = *open_;
    } else if (!take_job(job)) {
        return false;
    }
    Slice & slice = job.tensor->slices[job.expert];
    piece = slice.n_begun++;
    ++slice.n_inside;
    open_.reset();
    if ((!job.ahead() || slice.upcoming > 0) && slice.n_begun < job.tensor->n_pieces()) {
        open_ = job;
    }
    notify_work();  // the next one for another thread
    return true;
}

// And of a guess those that follow, until it was wrong, or others help because it was right.
void Pager::read_piece(const Job & job, int piece, Lock & lock) {
    PagedTensor & tensor = *job.tensor;
    Slice &       slice  = tensor.slices[job.expert];
    while (true) {
        read(job, piece, lock);
        --slice.n_inside;
        const bool is_open = open_ && open_->tensor == &tensor && open_->expert == job.expert;
        if (slice.os_error != 0 || slice.abandoned) {  // the rest is not worth reading
            if (is_open) {
                open_.reset();
            }
        } else if (slice.n_begun < tensor.n_pieces()) {
            if (!job.ahead() || is_open) {
                return;
            }
            if (slice.upcoming > 0 && !open_) {
                open_ = job;
                return;
            }
            piece = slice.n_begun++;
            ++slice.n_inside;
            continue;
        }
        if (slice.n_inside == 0) {
            finish_read(job);
        }
        return;
    }
}

// All of the slice's pieces are here, or those that were begun.
void Pager::finish_read(const Job & job) {
    PagedTensor & tensor = *job.tensor;
    Model &       model  = *tensor.model;
    Slice &       slice  = tensor.slices[job.expert];
    const bool    ahead  = job.ahead();
    const bool    whole  = slice.os_error == 0 && slice.n_begun == tensor.n_pieces();
    model.reads.fetch_add(1, std::memory_order_relaxed);
    model.rereads.fetch_add(slice.was_read ? 1 : 0, std::memory_order_relaxed);
    slice.was_read = slice.was_read || whole;
    --(ahead ? n_reading_ahead_ : n_reading_);
    if (ahead) {
        model.ahead_reads.fetch_add(1, std::memory_order_relaxed);
        slice.ahead = slice.guess && slice.upcoming == 0;
    }
    if (whole) {
        slice.state.store(State::resident, std::memory_order_seq_cst);
    } else {
        const bool failed = slice.os_error != 0;
        model.read_errors.fetch_add(failed ? 1 : 0, std::memory_order_relaxed);
        model.wasted_bytes.fetch_add(failed ? 0 : tensor.piece_begin(slice.n_begun), std::memory_order_relaxed);
        slice.state = failed && !slice.retry ? State::failed : State::absent;
        release(tensor, job.expert);
    }
    arrived_.notify_all();
}

void Pager::read(const Job & job, int piece, Lock & lock) {
    PagedTensor & tensor = *job.tensor;
    Model &       model  = *tensor.model;
    const size_t  at     = tensor.piece_begin(piece);
    lock.unlock();
    const auto begin = std::chrono::steady_clock::now();
    ReadResult result;
    try {
        result = model.store->read(*tensor.file, tensor.slice_data(job.expert) + at, tensor.piece_length(piece),
                                   tensor.slice_offset(job.expert) + at, tensor.repacker.get());
    } catch (const std::bad_alloc &) {
        result.os_error = ENOMEM;
    }
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
    lock.lock();
    model.read_ns.fetch_add((uint64_t) ns, std::memory_order_relaxed);
    model.bytes_read.fetch_add(result.bytes, std::memory_order_relaxed);
    model.ahead_bytes.fetch_add(job.ahead() ? result.bytes : 0, std::memory_order_relaxed);
    if (result.os_error != 0) {
        tensor.slices[job.expert].os_error = result.os_error;
    }
}

// The layer has chosen: guesses that were wrong leave the queue, or stop being read; those that were right count as used.
void Pager::drop_guesses(Group & group, const std::vector<int32_t> & needed) {
    for (PagedTensor * part : group.parts) {
        for (int32_t e : needed) {
            part->slices[e].ahead = false;
        }
        for (int e = 0; e < part->n_experts; ++e) {
            Slice & slice = part->slices[e];
            if (!slice.guess || (slice.state != State::queued && slice.state != State::reading)) {
                continue;
            }
            const bool right = std::find(needed.begin(), needed.end(), e) != needed.end();
            if (slice.state == State::reading) {
                slice.abandoned = !right && slice.upcoming == 0;
            } else if (!right) {
                dequeue(*part, e);
            }
        }
    }
}

void Pager::work() {
    Lock lock(mutex_);
    while (!stopping_) {
        Job job;
        int piece;
        if (take_piece(job, piece)) {
            read_piece(job, piece, lock);
        } else {
            ++n_idle_threads_;
            work_.wait(lock);
            --n_idle_threads_;
        }
    }
}

bool Pager::run_one_read() {
    Lock lock(mutex_);
    Job job;
    int piece;
    bool any = false;
    while ((!any || open_) && take_piece(job, piece)) {
        read_piece(job, piece, lock);
        any = true;
    }
    return any;
}

void Pager::notify_work() {
    if ((open_ || !queue_.empty()) && n_idle_threads_ > 0) {
        work_.notify_one();
    }
}

// Until its removal begins.
bool Pager::serves(const Model & model) const {
    return std::any_of(models_.begin(), models_.end(), [&](const auto & m) { return m.get() == &model; });
}

int Pager::prefetch(Model & model, const spac_bundle * bundles, int n) {
    Lock lock(mutex_);
    if (!serves(model)) {
        return 0;
    }
    const size_t before = queue_.size();
    for (int i = 0; i < n; ++i) {
        for (auto & group : model.groups) {
            const int e = bundles[i].expert;
            if (group->layer != bundles[i].layer || e < 0 || e >= group->n_experts || !(bundles[i].utility > 0) ||
                !std::isfinite(bundles[i].utility)) {
                continue;
            }
            model.policy->expect(group->index, e, bundles[i].utility);
            const double rank = -model.policy->worth(group->index, e);
            for (PagedTensor * part : group->parts) {
                enqueue(*part, e, prefetch_deadline + std::clamp(bundles[i].deadline, 0, latest_deadline), rank, nullptr);
            }
        }
    }
    notify_work();
    return (int) (queue_.size() - before);
}

int Pager::foresee(Model & model, const Foresight & foresight) {
    Lock lock(mutex_);
    if (!serves(model)) {
        return 0;
    }
    const size_t before = queue_.size();
    size_t at = 0;  // [group][expert]
    for (const auto & group : model.groups) {
        model.policy->foresee(group->index, foresight.now + at, foresight.later + at, foresight.rest + at);
        for (int e = 0; e < group->n_experts; ++e) {
            if (!(foresight.now[at + e] >= foresight.read_from)) {
                continue;
            }
            for (PagedTensor * part : group->parts) {
                enqueue(*part, e, prefetch_deadline + group->index, -(double) foresight.now[at + e], nullptr, true);
            }
        }
        at += (size_t) group->n_experts;
    }
    notify_work();
    return (int) (queue_.size() - before);
}

//
// room in the budget
//

bool Pager::idle(PagedTensor & tensor, int expert) const {
    const Slice & slice = tensor.slices[expert];
    return slice.state == State::resident && slice.users == 0;
}

bool Pager::is_head(const PagedTensor & tensor, int expert) const {
    for (const Op * op : ops_) {
        if (op->tensor == &tensor && op->head < op->needed.size() && op->needed[op->head] == expert) {
            return true;
        }
    }
    return false;
}

double Pager::worth(const PagedTensor & tensor, int expert) const {
    return tensor.model->policy->worth(tensor.group->index, expert);
}

// Whether a slice may go that no op will use.
bool Pager::droppable(PagedTensor & tensor, int expert) const {
    return expert < tensor.n_experts && tensor.slices[expert].upcoming == 0 && idle(tensor, expert) && !is_head(tensor, expert);
}

void Pager::count_present(Bundle & bundle, int change) {
    const bool before = bundle.n_present > 0;
    bundle.n_present += change;
    if (const bool now = bundle.n_present > 0; now != before) {
        bundle.group->parts[0]->model->policy->set_present(bundle.group->index, bundle.expert, now);
    }
}

Pager::Victim Pager::cheapest(const PagedTensor * heir) const {
    Victim cheapest;
    for (const auto & model : models_) {
        PagedTensor * tensor = nullptr;
        const Policy::Victim found = model->policy->cheapest([&](int group, int expert) {
            PagedTensor * fits = nullptr;
            for (PagedTensor * part : model->groups[group]->parts) {
                if (droppable(*part, expert) && (!fits || (heir && part->slots == heir->slots && fits->slots != heir->slots))) {
                    fits = part;
                }
            }
            tensor = fits ? fits : tensor;
            return fits != nullptr;
        });
        if (tensor && (!cheapest.tensor || found.worth < cheapest.score)) {
            cheapest = { tensor, found.expert, found.worth };
        }
    }
    return cheapest;
}

// Slices that ops will still use, the latest use first: other tensors before the op's own, its own from the back.
Pager::Victim Pager::spare_upcoming(const Op * op) const {
    Victim victim;
    for (const auto & model : models_) {
        for (const auto & tensor : model->tensors) {
            for (int e = 0; e < tensor->n_experts; ++e) {
                if (tensor->slices[e].upcoming == 0 || !idle(*tensor, e) || is_head(*tensor, e)) {
                    continue;
                }
                const double lateness = op && tensor.get() == op->tensor ? op->position[e] : 1e9 + tensor->rank;
                if (!victim.tensor || lateness > victim.score) {
                    victim = { tensor.get(), e, lateness };
                }
            }
        }
    }
    return victim;
}

bool Pager::make_room(const Job & job, Claim claim, Refusal & refusal) {
    const double own_score = worth(*job.tensor, job.expert);
    if (refusal.full && claim != Claim::anything_idle && (claim == Claim::not_upcoming ? refusal.nothing : own_score <= refusal.score)) {
        return false;  // an earlier job of this search found out
    }
    const auto refuse = [&] {
        if (job.tensor->slices[job.expert].slot) {  // left to it by what was evicted
            job.tensor->vacate(job.expert);
        }
        return false;
    };
    while (used_ + job.tensor->slot_bytes > budget_) {
        Victim victim = cheapest(job.tensor);
        refusal.full    = true;
        refusal.nothing = !victim.tensor;
        refusal.score   = victim.tensor ? victim.score : HUGE_VAL;
        if (victim.tensor && claim == Claim::worth_less && victim.score >= own_score) {
            return refuse();
        }
        if (!victim.tensor && claim == Claim::anything_idle) {
            victim = spare_upcoming(job.tensor->slices[job.expert].op);
        }
        if (!victim.tensor || !evict(*victim.tensor, victim.expert, &job)) {
            if (claim == Claim::anything_idle && !starving_.exchange(true)) {
                continue;  // once more, now that whoever leaves an expert says so
            }
            return refuse();
        }
    }
    return true;
}

// False if a compute thread got there first.
bool Pager::evict(PagedTensor & tensor, int expert, const Job * heir) {
    Slice & slice = tensor.slices[expert];
    if (slice.state != State::resident) {
        return false;
    }
    slice.state.store(State::absent, std::memory_order_seq_cst);
    if (slice.users.load(std::memory_order_seq_cst) != 0) {
        slice.state.store(State::resident, std::memory_order_seq_cst);
        return false;
    }
    tensor.model->evictions.fetch_add(1, std::memory_order_relaxed);
    if (slice.ahead) {
        tensor.model->wasted_bytes.fetch_add(tensor.slice_bytes, std::memory_order_relaxed);
        slice.ahead = false;
    }
    release(tensor, expert, heir);
    return true;
}

// A slice is present no more: its slot goes to the heir, if that has none yet and it fits, or its pages to the kernel.
void Pager::release(PagedTensor & tensor, int expert, const Job * heir) {
    used_ -= tensor.slot_bytes;
    tensor.model->used_bytes -= tensor.slot_bytes;
    if (!heir || !tensor.leave(expert, *heir->tensor, heir->expert)) {
        tensor.vacate(expert);
    }
    count_present(tensor.group->bundles[expert], -1);
}

}  // namespace spac
