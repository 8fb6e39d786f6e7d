// The compute side of the pager: models, ubatches, layers, ops. The reading side is in pager-queue.cpp.
#include "pager.h"

#include <algorithm>
#include <chrono>

namespace spac {

// A layer's visit that needs at most this part of the budget keeps its bundles together; what needs more streams by slices.
static constexpr uint64_t whole_visit_part = 8;

// With its first and last block one read of a store.
static constexpr size_t largest_piece_bytes = (1 << 20) - (1 << 16);

//
// set-up
//

void Model::arrange() {
    std::stable_sort(tensors.begin(), tensors.end(), [](const auto & a, const auto & b) {
        return a->group->key != b->group->key ? a->group->key < b->group->key : a->rank < b->rank;
    });
    std::stable_sort(groups.begin(), groups.end(), [](const auto & a, const auto & b) { return a->key < b->key; });
    for (auto & tensor : tensors) {
        Group & group    = *tensor->group;
        tensor->model    = this;
        tensor->part     = (int) group.parts.size();
        tensor->slices   = std::make_unique<Slice[]>(tensor->n_experts);
        tensor->piece_bytes = even_piece(tensor->slice_bytes, tensor->repacker ? tensor->repacker->unit_bytes() : page_size(), largest_piece_bytes);
        group.n_experts  = std::max(group.n_experts, tensor->n_experts);
        group.parts.push_back(tensor.get());
        expert_bytes += (uint64_t) tensor->n_experts * tensor->slice_bytes;
    }
    std::vector<int> n_experts_by_group;
    for (size_t i = 0; i < groups.size(); ++i) {
        Group & group = *groups[i];
        n_experts_by_group.push_back(group.n_experts);
        group.index   = (int) i;
        group.bundles.resize(group.n_experts);
        for (int expert = 0; expert < group.n_experts; ++expert) {
            group.bundles[expert].group  = &group;
            group.bundles[expert].expert = expert;
        }
        n_experts = std::max(n_experts, group.n_experts);
    }
    policy = std::make_unique<Policy>(n_experts_by_group);
    reserve();
    for (const auto & group : groups) {
        for (int expert = 0; expert < group->n_experts; ++expert) {
            uint64_t bytes = 0;
            for (PagedTensor * part : group->parts) {
                bytes += expert < part->n_experts ? part->slot_bytes : 0;
            }
            max_bundle_bytes = std::max(max_bundle_bytes, bytes);
        }
    }
}

// One size of slots for all slices of one size, wherever in a page they begin: so that they can leave them to each other.
void Model::reserve() {
    std::map<size_t, std::pair<size_t, int>> slots;  // bytes of one, and how many
    for (auto & tensor : tensors) {
        auto & [bytes, n] = slots[tensor->slice_bytes];
        bytes = std::max(bytes, tensor->most_page_bytes());
        n += tensor->n_experts;
    }
    for (const auto & [slice_bytes, slot] : slots) {
        pools[slice_bytes] = store->maps() ? nullptr : std::make_unique<SlotPool>(slot.first, slot.second);
        expert_page_bytes += (uint64_t) slot.first * (uint64_t) slot.second;
    }
    for (auto & tensor : tensors) {
        tensor->slot_bytes = slots[tensor->slice_bytes].first;
        tensor->slots      = pools[tensor->slice_bytes].get();
        tensor->mapped     = tensor->slots ? nullptr : store->map(*tensor->file, tensor->n_experts * tensor->slice_bytes, tensor->offset);
    }
}

Pager::~Pager() {
    halt();
}

void Pager::halt() {
    Lock setup(setup_mutex_);
    {
        Lock lock(mutex_);
        for (auto & model : models_) {
            drop_reads(*model, lock);
        }
    }
    stop_threads();
}

void Pager::drop_reads(Model & model, Lock & lock) {
    for (auto & tensor : model.tensors) {
        for (int e = 0; e < tensor->n_experts; ++e) {
            tensor->slices[e].abandoned = true;
            if (tensor->slices[e].state == State::queued) {
                dequeue(*tensor, e);
            }
        }
    }
    for (auto & tensor : model.tensors) {
        for (int e = 0; e < tensor->n_experts; ++e) {
            arrived_.wait(lock, [&] { return tensor->slices[e].state != State::reading; });
        }
    }
}

void Pager::stop_threads() {
    std::vector<std::thread> retired;
    {
        Lock lock(mutex_);
        stopping_ = true;
        retired.swap(threads_);
    }
    work_.notify_all();
    for (auto & thread : retired) {
        thread.join();
    }
    Lock lock(mutex_);
    stopping_ = false;
}

void Pager::add_model(std::shared_ptr<Model> model, int n_io_threads) {
    Lock setup(setup_mutex_);
    Lock lock(mutex_);
    contexts_.insert(&model->default_context);
    if (models_.empty()) {
        peak_ = used_.load();
    }
    models_.push_back(std::move(model));
    budget_ = usable();
    while ((int) threads_.size() < n_io_threads) {
        threads_.emplace_back([this, first = models_.back()]() mutable {
            first->store->begin_thread();
            first.reset();
            work();
        });
    }
}

void Pager::remove_model(Model & model) {
    Lock setup(setup_mutex_);
    bool last = false;
    {
        Lock lock(mutex_);
        // nobody queues anything for it any more
        models_.erase(std::remove_if(models_.begin(), models_.end(), [&](const auto & m) { return m.get() == &model; }), models_.end());
        for (spac_context * context : contexts_) {
            if (context->visit.group && context->visit.group->parts[0]->model == &model) {
                end_visit(*context);
            }
        }
        drop_reads(model, lock);
        for (auto & tensor : model.tensors) {
            for (int e = 0; e < tensor->n_experts; ++e) {
                evict(*tensor, e);
            }
        }
        contexts_.erase(&model.default_context);
        follow_budget(lock);  // its floor counts no more, and there is room for others
        last = models_.empty();
    }
    if (last) {
        stop_threads();
    }
}

void Pager::add_context(spac_context * context) {
    Lock lock(mutex_);
    contexts_.insert(context);
}

void Pager::remove_context(spac_context * context) {
    Lock lock(mutex_);
    end_visit(*context);
    contexts_.erase(context);
    notify_work();
}

int Pager::take_error(spac_context & context, spac_error & error) {
    Lock lock(mutex_);
    end_visit(context);
    notify_work();
    return context.take(error);
}

int Pager::set_budget(uint64_t bytes) {
    Lock lock(mutex_);
    if (bytes < floor()) {
        return SPAC_E_BUDGET;
    }
    granted_ = bytes;
    follow_budget(lock);
    return SPAC_OK;
}

void Pager::set_cap(uint64_t bytes) {
    Lock lock(mutex_);
    if (bytes != cap_) {
        cap_ = bytes;
        follow_budget(lock);
    }
}

uint64_t Pager::floor() const {
    uint64_t most = 0;
    for (const auto & model : models_) {
        most = std::max(most, model->floor_bytes());
    }
    return most;
}

// What is granted, or the cap if that is less.
uint64_t Pager::usable() const {
    return std::min(granted_.load(), std::max(cap_, floor()));
}

// Brings the budget to what is usable now, and what is used down to the budget; or lets it grow.
void Pager::follow_budget(Lock & lock) {
    budget_ = usable();
    arrived_.notify_all();
    while (used_ > budget_) {
        Victim victim = cheapest();
        if (!victim.tensor) {
            victim = spare_upcoming(nullptr);
        }
        if ((!victim.tensor || !evict(*victim.tensor, victim.expert)) && starving_.exchange(true)) {
            arrived_.wait(lock);  // all that is left is in flight or in use: it will be let go
        }
    }
    notify_work();
}

int Pager::evict_all(Model & model) {
    Lock lock(mutex_);
    int n = 0;
    for (auto & tensor : model.tensors) {
        for (int e = 0; e < tensor->n_experts; ++e) {
            if (tensor->slices[e].upcoming == 0 && evict(*tensor, e)) {
                ++n;
            }
        }
    }
    notify_work();
    return n;
}

void Pager::wake() {
    Lock lock(mutex_);
    arrived_.notify_all();
}

//
// ops
//

Op * Pager::begin_op(PagedTensor & tensor, spac_context * context, const int64_t * row_counts, int32_t * order, int n_threads,
                     const Routing & routing) {
    Lock lock(mutex_);
    Group & group = *tensor.group;
    if (!context || contexts_.count(context) == 0) {
        context = &tensor.model->default_context;
    }

    if (free_ops_.empty()) {
        all_ops_.push_back(std::make_unique<Op>());
        free_ops_.push_back(all_ops_.back().get());
    }
    Op & op = *free_ops_.back();
    op.tensor    = &tensor;
    op.context   = context;
    op.n_threads = n_threads;
    op.owner     = std::this_thread::get_id();
    op.head      = 0;
    op.n_done    = 0;
    op.needed.clear();
    for (int e = 0; e < tensor.n_experts; ++e) {
        if (row_counts[e] > 0) {
            op.needed.push_back(e);
        }
    }
    if (op.needed.empty()) {
        return nullptr;
    }

    const uint32_t bit = 1u << tensor.part;
    if (context->visit.group != &group || (context->visit.seen_parts & bit)) {
        end_visit(*context);
        begin_visit(tensor, *context, op.needed, routing);
    }
    context->visit.seen_parts |= bit;

    // what is here first, then what is on its way: compute hides the reads of the rest
    std::stable_sort(op.needed.begin(), op.needed.end(), [&](int32_t a, int32_t b) {
        const auto rank = [&](int32_t e) {
            const State s = tensor.slices[e].state;
            return s == State::resident ? 0 : s == State::reading ? 1 : 2;
        };
        return rank(a) < rank(b);
    });
    op.position.assign(tensor.n_experts, -1);
    while (op.left.size() < op.needed.size()) {
        op.left.push_back(std::make_unique<std::atomic<int>>(0));
    }
    size_t n_ordered = 0;
    for (size_t i = 0; i < op.needed.size(); ++i) {
        const int32_t e = op.needed[i];
        op.position[e]  = (int32_t) i;
        *op.left[i]     = 0;
        order[n_ordered++] = e;
    }
    for (int e = 0; e < tensor.n_experts; ++e) {
        if (op.position[e] < 0) {
            order[n_ordered++] = e;
        }
    }
    free_ops_.pop_back();
    ops_.push_back(&op);

    if (!context->stopped) {
        for (size_t i = 0; i < op.needed.size(); ++i) {
            enqueue(tensor, op.needed[i], 0, (double) i, &op);
        }
        for (PagedTensor * part : group.parts) {  // the layer's other tensors will be asked for the same experts
            if (!(context->visit.seen_parts & (1u << part->part))) {
                for (size_t i = 0; i < op.needed.size(); ++i) {
                    enqueue(*part, op.needed[i], 1 + part->rank, (double) i, nullptr);
                }
            }
        }
        notify_work();
    }
    return &op;
}

const void * Pager::begin_expert(Op & op, int expert) {
    Slice & slice = op.tensor->slices[expert];
    slice.users.fetch_add(1, std::memory_order_seq_cst);
    if (slice.state.load(std::memory_order_seq_cst) == State::resident && !op.context->stopped.load(std::memory_order_acquire)) {
        return op.tensor->slice_data(expert);
    }
    let_go(slice);

    const bool counted = op.owner == std::this_thread::get_id();
    const auto begin   = std::chrono::steady_clock::now();
    Lock lock(mutex_);
    bool here = false;
    while (!op.context->stopped) {
        const State state = slice.state;
        if (state == State::resident) {
            slice.users.fetch_add(1, std::memory_order_seq_cst);
            here = true;
            break;
        }
        if (state == State::failed) {
            op.context->stop(SPAC_E_IO, slice.os_error, op.tensor->file->path, op.tensor->slice_offset(expert), op.tensor->slice_bytes);
            arrived_.notify_all();
            break;
        }
        if (state == State::absent || state == State::queued) {  // another op's head took its place
            enqueue(*op.tensor, expert, 0, (double) op.position[expert], &op);
            notify_work();
        }
        arrived_.wait(lock);
    }
    if (counted) {
        const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count();
        op.tensor->model->stall_ns.fetch_add((uint64_t) ns, std::memory_order_relaxed);
    }
    if (!here && op.left[op.position[expert]]->fetch_add(1) + 1 == op.n_threads) {
        leave(op, expert);
    }
    return here ? op.tensor->slice_data(expert) : nullptr;
}

void Pager::end_expert(Op & op, int expert) {
    const int n_threads = op.n_threads;
    let_go(op.tensor->slices[expert]);
    if (op.left[op.position[expert]]->fetch_add(1) + 1 == n_threads) {
        Lock lock(mutex_);
        leave(op, expert);
    }
}

// A thread is no longer inside.
void Pager::let_go(Slice & slice) {
    if (slice.users.fetch_sub(1, std::memory_order_seq_cst) == 1 && starving_.load(std::memory_order_seq_cst)) {
        Lock lock(mutex_);
        starving_ = false;
        notify_work();
        arrived_.notify_all();
    }
}

// All threads are done with the expert.
void Pager::leave(Op & op, int expert) {
    if (!op.context->visit.whole) {
        close_upcoming(*op.context, *op.tensor, expert);
    }
    while (op.head < op.needed.size() && *op.left[op.head] == op.n_threads) {
        ++op.head;
    }
    if (++op.n_done == op.needed.size()) {
        finish_op(op);
    }
    notify_work();  // there may be room now
    if (used_ > budget_) {
        arrived_.notify_all();  // set_budget() waits for it
    }
}

void Pager::finish_op(Op & op) {
    for (int32_t e : op.needed) {  // left over only if experts were skipped
        Slice & slice = op.tensor->slices[e];
        if (slice.state == State::queued && slice.op == &op) {
            dequeue(*op.tensor, e);
            arrived_.notify_all();
        }
    }
    const Visit & visit = op.context->visit;
    if (visit.group == op.tensor->group && visit.seen_parts + 1 == 1u << visit.group->parts.size()) {  // the layer's last op
        for (PagedTensor * part : visit.group->parts) {
            for (int32_t e : visit.experts) {
                close_upcoming(*op.context, *part, e);
            }
        }
    }
    ops_.erase(std::find(ops_.begin(), ops_.end(), &op));
    free_ops_.push_back(&op);
}

//
// layers and ubatches
//

void Pager::begin_visit(PagedTensor & tensor, spac_context & context, const std::vector<int32_t> & needed, const Routing & routing) {
    Group & group = *tensor.group;
    if (group.index <= context.last_group) {
        begin_ubatch(*tensor.model, context, routing);
    }
    context.last_group = group.index;

    Visit & visit    = context.visit;
    visit.group      = &group;
    visit.seen_parts = 0;
    visit.experts    = needed;
    visit.whole      = needed.size() * tensor.model->max_bundle_bytes <= budget_ / whole_visit_part;
    visit.open.assign(group.parts.size() * (size_t) group.n_experts, 0);
    count_uses(group, context.end_token, needed, routing);
    drop_guesses(group, needed);
    tensor.model->policy->begin(group.index);
    tensor.model->policy->use_ubatch(group.index, needed, routing.n_tokens, routing.n_used,
                                     [&](int64_t token, int i) { return routing.at(token, i); });
    for (PagedTensor * part : group.parts) {
        for (int32_t e : needed) {
            visit.open[(size_t) part->part * group.n_experts + e] = 1;
            Slice & slice = part->slices[e];
            ++slice.upcoming;
            slice.retry = slice.state == State::reading;
            if (slice.state == State::failed) {
                slice.state = State::absent;  // try again
            }
        }
    }
}

void Pager::begin_ubatch(Model & model, spac_context & context, const Routing & routing) {
    if (model.unusable != SPAC_OK) {
        context.stop(model.unusable, 0, "", 0, 0);
    }
    for (auto & file : model.files) {
        if (file->changed()) {
            context.stop(SPAC_E_CHANGED, 0, file->path, 0, 0);
        }
    }
    context.end_token = model.tokens.fetch_add((uint64_t) routing.n_tokens, std::memory_order_relaxed) + (uint64_t) routing.n_tokens;
    model.ubatches.fetch_add(1, std::memory_order_relaxed);
}

void Pager::count_uses(Group & group, uint64_t end_token, const std::vector<int32_t> & needed, const Routing & routing) {
    Model & model = *group.parts[0]->model;
    std::vector<uint8_t> hit(group.n_experts, 0);
    uint64_t n_hits = 0;
    for (int32_t e : needed) {
        hit[e] = std::all_of(group.parts.begin(), group.parts.end(),
                             [&](const PagedTensor * part) { return part->slices[e].state == State::resident; });
        n_hits += hit[e];
    }
    const uint64_t n_misses = needed.size() - n_hits;
    model.hits.fetch_add(n_hits, std::memory_order_relaxed);
    model.misses.fetch_add(n_misses, std::memory_order_relaxed);
    group.hits.fetch_add(n_hits, std::memory_order_relaxed);
    group.misses.fetch_add(n_misses, std::memory_order_relaxed);

    const uint64_t first_token = end_token - (uint64_t) routing.n_tokens;
    for (int64_t token = 0; token < routing.n_tokens; ++token) {
        spac_event event{};
        event.token     = first_token + (uint64_t) token;
        event.stall_ns  = model.stall_ns.load(std::memory_order_relaxed);
        event.layer     = (uint16_t) group.layer;
        event.n_experts = (uint16_t) routing.n_used;
        for (int i = 0; i < routing.n_used && i < SPAC_EVENT_MAX_EXPERTS; ++i) {
            const int32_t e  = routing.at(token, i);
            event.experts[i] = (uint16_t) e;
            event.hit_mask |= e >= 0 && e < group.n_experts && hit[e] ? 1u << i : 0u;
        }
        model.events.write(event);
    }
}

void Pager::end_visit(spac_context & context) {
    Visit & visit = context.visit;
    if (!visit.group) {
        return;
    }
    for (PagedTensor * part : visit.group->parts) {
        for (int32_t e : visit.experts) {
            close_upcoming(context, *part, e);
            Slice & slice = part->slices[e];
            if (slice.state == State::queued && !slice.op && slice.upcoming == 0) {
                dequeue(*part, e);
            }
        }
    }
    visit.group = nullptr;
}

void Pager::close_upcoming(spac_context & context, PagedTensor & tensor, int expert) {
    Visit & visit = context.visit;
    if (visit.group == tensor.group) {
        uint8_t & open = visit.open[(size_t) tensor.part * tensor.group->n_experts + expert];
        tensor.slices[expert].upcoming -= open;
        open = 0;
    }
}

}  // namespace spac
