#include "library.h"

#include "error.h"

namespace spac {

static constexpr int default_io_threads = 6;

struct Load {
    bool         open = false;
    spac_options options{};
    std::shared_ptr<Model> model;
    int          code = SPAC_OK;
    std::string  line;
};
static thread_local Load load_of_thread;

Library & Library::get() {
    static Library * library = new Library;
    return *library;
}

void Library::begin_load(const spac_options & options) {
    load_of_thread = Load{};
    load_of_thread.open    = true;
    load_of_thread.options = options;
    load_of_thread.model   = std::make_shared<Model>();
}

std::shared_ptr<Model> Library::loading() {
    return load_of_thread.open ? load_of_thread.model : nullptr;
}

const spac_options & Library::load_options() const {
    return load_of_thread.options;
}

void Library::load_failed(int code, std::string line) {
    if (load_of_thread.code == SPAC_OK) {
        load_of_thread.code = code;
        load_of_thread.line = std::move(line);
    }
}

int Library::end_load() {
    Load load = std::move(load_of_thread);
    load_of_thread = Load{};
    if (!load.open) {
        return fail(SPAC_E_ARGUMENT, "spac_load_end without spac_load_begin");
    }
    if (load.model->tensors.empty()) {
        return load.code == SPAC_OK ? 0 : fail(load.code, load.line);
    }
    const int code = adopt(load.model, load.options.n_io_threads);
    if (load.code != SPAC_OK) {
        load.model->unusable = load.code;
        return fail(load.code, load.line);
    }
    if (code != SPAC_OK) {
        load.model->unusable = code;
        return code;
    }
    return load.model->id;
}

int Library::adopt(const std::shared_ptr<Model> & model, int n_io_threads) {
    const int arranged = guarded([&] {
        model->arrange();
        return SPAC_OK;
    });
    {
        std::lock_guard<std::mutex> lock(mutex_);
        model->id = next_id_++;
        models_[model->id] = model;
    }
    pager.add_model(model, n_io_threads > 0 ? n_io_threads : default_io_threads);
    if (arranged != SPAC_OK) {
        return arranged;
    }
    if (pager.granted() < model->floor_bytes()) {
        return fail(SPAC_E_BUDGET, "the expert budget of " + std::to_string(pager.granted()) + " bytes is below this model's floor of " +
                                       std::to_string(model->floor_bytes()) + " bytes");
    }
    return SPAC_OK;
}

void Library::forget(const std::shared_ptr<Model> & model) {
    if (model->id == 0) {  // its load was given up
        model->tensors.clear();
        return;
    }
    pager.remove_model(*model);
    std::lock_guard<std::mutex> lock(mutex_);
    models_.erase(model->id);
}

void Library::watch_pressure(std::vector<Gauge> gauges) {
    const bool ends = gauges.empty();
    watch_.watch(std::move(gauges));
    if (ends) {
        look(std::nullopt, 0);
    }
}

void Library::look(std::optional<int64_t> spare, double now) {
    if (!spare) {
        rule_ = PressureRule();
    }
    const uint64_t cap = spare ? rule_.cap(*spare, pager.used_bytes(), pager.granted(), now) : no_cap;
    shortages_ += cap != no_cap && !capped_;
    capped_ = cap != no_cap;
    pager.set_cap(cap);
}

std::shared_ptr<Model> Library::find(int id) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = models_.find(id);
    return it == models_.end() ? nullptr : it->second;
}

}  // namespace spac
