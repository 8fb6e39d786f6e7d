// The C ABI: argument checks, conversions, nothing else.
#include "include/spac.h"

#include "buffer-type.h"
#include "error.h"
#include "library.h"
#include "simulate.h"

#include <algorithm>
#include <numeric>

using spac::fail;
using spac::guarded;
using spac::Library;

namespace {

template <typename T> int check_size(const T * object, const char * name) {
    if (!object || object->struct_size != sizeof(T)) {
        return fail(SPAC_E_ARGUMENT, std::string(name) + ": struct_size does not match this libspac (ABI " +
                                         std::to_string(SPAC_ABI_VERSION) + ")");
    }
    return SPAC_OK;
}

// Finds the model, or says that there is none.
int with_model(int id, std::shared_ptr<spac::Model> & model) {
    model = Library::get().find(id);
    return model ? SPAC_OK : fail(SPAC_E_ARGUMENT, "no paged model has id " + std::to_string(id) + " (closed?)");
}

}  // namespace

//
// library
//

int spac_abi_version(void) {
    return SPAC_ABI_VERSION;
}

size_t spac_struct_size(int which) {
    switch (which) {
        case SPAC_STRUCT_OPTIONS: return sizeof(spac_options);
        case SPAC_STRUCT_INFO:    return sizeof(spac_info);
        case SPAC_STRUCT_STATS:   return sizeof(spac_stats);
        case SPAC_STRUCT_EVENT:   return sizeof(spac_event);
        case SPAC_STRUCT_ERROR:   return sizeof(spac_error);
        case SPAC_STRUCT_MEMORY:  return sizeof(spac_memory);
        case SPAC_STRUCT_BUNDLE:  return sizeof(spac_bundle);
        case SPAC_STRUCT_SIMULATION: return sizeof(spac_simulation);
        case SPAC_STRUCT_ROUTING: return sizeof(spac_routing);
        case SPAC_STRUCT_READS:   return sizeof(spac_reads);
        case SPAC_STRUCT_PRODUCTS: return sizeof(spac_products);
        case SPAC_STRUCT_GAUGE: return sizeof(spac_gauge);
        case SPAC_STRUCT_PROBE:   return sizeof(spac_probe);
        default:                  return 0;
    }
}

const char * spac_last_error(void) {
    return spac::last_error();
}

int spac_init(void) {
    return guarded([] { return spac::register_buffer_type(); });
}

void * spac_buffer_type(void) {
    return spac::buffer_type();
}

void spac_halt(void) {
    Library::get().pager.halt();
}

//
// budget
//

int spac_budget_set(uint64_t bytes) {
    const int code = Library::get().pager.set_budget(bytes);
    return code == SPAC_OK ? code : fail(code, "an expert budget of " + std::to_string(bytes) + " bytes is below a loaded model's floor");
}

int spac_pressure_watch(const spac_gauge * gauges, int n) {
    std::vector<spac::Gauge> all;
    for (int i = 0; i < n; ++i) {
        if (const int code = check_size(&gauges[i], "spac_gauge")) {
            return code;
        }
        if (!gauges[i].folder) {
            return fail(SPAC_E_ARGUMENT, "spac_pressure_watch: no folder");
        }
        all.emplace_back(gauges[i].folder, gauges[i].headroom_bytes);
    }
    return guarded([&] {
        Library::get().watch_pressure(std::move(all));
        return SPAC_OK;
    });
}

//
// models
//

int spac_load_begin(const spac_options * options) {
    if (const int code = check_size(options, "spac_options")) {
        return code;
    }
    if (options->store < SPAC_STORE_AUTO || options->store > SPAC_STORE_MOCK || options->n_io_threads < 0 || options->n_io_threads > 256) {
        return fail(SPAC_E_ARGUMENT, "spac_options: no such store or number of I/O threads");
    }
    return guarded([&] {
        Library::get().begin_load(*options);
        return SPAC_OK;
    });
}

int spac_load_end(void) {
    return guarded([] { return Library::get().end_load(); });
}

int spac_model_info(int id, spac_info * info) {
    std::shared_ptr<spac::Model> model;
    int code = check_size(info, "spac_info");
    if (code != SPAC_OK || (code = with_model(id, model)) != SPAC_OK) {
        return code;
    }
    info->expert_bytes      = model->expert_bytes;
    info->expert_page_bytes = model->expert_page_bytes;
    info->max_bundle_bytes  = model->max_bundle_bytes;
    info->floor_bytes       = model->floor_bytes();
    info->n_layers          = (int32_t) model->groups.size();
    info->n_experts         = model->n_experts;
    info->n_tensors         = (int32_t) model->tensors.size();
    info->n_repacked        = (int32_t) std::count_if(model->tensors.begin(), model->tensors.end(), [](auto & t) { return !!t->repacker; });
    info->store             = model->store->id();
    info->n_bundles         = model->n_bundles();
    return SPAC_OK;
}

int spac_model_stats(int id, spac_stats * stats) {
    std::shared_ptr<spac::Model> model;
    int code = check_size(stats, "spac_stats");
    if (code != SPAC_OK || (code = with_model(id, model)) != SPAC_OK) {
        return code;
    }
    const spac::Pager & pager = Library::get().pager;
    stats->budget_bytes     = pager.budget();
    stats->used_bytes       = pager.used_bytes();
    stats->peak_bytes       = pager.peak_bytes();
    stats->model_used_bytes = model->used_bytes;
    stats->hits             = model->hits;
    stats->misses           = model->misses;
    stats->reads            = model->reads;
    stats->bytes_read       = model->bytes_read;
    stats->evictions        = model->evictions;
    stats->rereads          = model->rereads;
    stats->read_errors      = model->read_errors;
    stats->stall_ns         = model->stall_ns;
    stats->read_ns          = model->read_ns;
    stats->tokens           = model->tokens;
    stats->ubatches         = model->ubatches;
    stats->events           = model->events.written();
    stats->ahead_reads      = model->ahead_reads;
    stats->ahead_bytes      = model->ahead_bytes;
    stats->wasted_bytes     = model->wasted_bytes;
    stats->granted_bytes    = pager.granted();
    stats->shortages        = Library::get().shortages();
    return SPAC_OK;
}

int spac_model_stats_by_layer(int id, int32_t * layers, uint64_t * hits, uint64_t * misses, int n) {
    std::shared_ptr<spac::Model> model;
    if (const int code = with_model(id, model)) {
        return code;
    }
    if (n > 0 && (!layers || !hits || !misses)) {
        return fail(SPAC_E_ARGUMENT, "spac_model_stats_by_layer: null");
    }
    const int n_groups = (int) model->groups.size();
    for (int i = 0; i < std::min(n, n_groups); ++i) {
        layers[i] = model->groups[i]->layer;
        hits[i]   = model->groups[i]->hits;
        misses[i] = model->groups[i]->misses;
    }
    return n_groups;
}

int spac_model_events(int id, uint64_t from, spac_event * events, int n) {
    std::shared_ptr<spac::Model> model;
    if (const int code = with_model(id, model)) {
        return code;
    }
    return n > 0 && !events ? fail(SPAC_E_ARGUMENT, "spac_model_events: null") : model->events.read(from, events, n);
}

int spac_model_prefetch(int id, const spac_bundle * bundles, int n) {
    std::shared_ptr<spac::Model> model;
    if (const int code = with_model(id, model)) {
        return code;
    }
    if (n > 0 && !bundles) {
        return fail(SPAC_E_ARGUMENT, "spac_model_prefetch: null");
    }
    return guarded([&] { return Library::get().pager.prefetch(*model, bundles, n); });
}

int spac_model_foresee(int id, const float * now, const float * later, const float * rest, int n, float read_from) {
    std::shared_ptr<spac::Model> model;
    if (const int code = with_model(id, model)) {
        return code;
    }
    const int n_bundles = model->n_bundles();
    if (!now || !later || !rest || n != n_bundles) {
        return fail(SPAC_E_ARGUMENT, "spac_model_foresee: " + std::to_string(n) + " numbers for " + std::to_string(n_bundles) + " bundles");
    }
    for (int i = 0; i < n; ++i) {
        if (!(now[i] >= 0 && now[i] <= 1 && later[i] >= 0 && later[i] < 1e6f && rest[i] >= 0 && rest[i] < 1e6f)) {  // NaN, too
            return fail(SPAC_E_ARGUMENT, "spac_model_foresee: number " + std::to_string(i) + " is no probability or weight");
        }
    }
    return guarded([&] { return Library::get().pager.foresee(*model, { now, later, rest, read_from }); });
}

int spac_model_evict_all(int id) {
    std::shared_ptr<spac::Model> model;
    const int code = with_model(id, model);
    return code != SPAC_OK ? code : Library::get().pager.evict_all(*model);
}

int spac_mock_fail_reads(int id, int after, int count, int os_error) {
    std::shared_ptr<spac::Model> model;
    if (const int code = with_model(id, model)) {
        return code;
    }
    if (model->store->id() != SPAC_STORE_MOCK) {
        return fail(SPAC_E_ARGUMENT, "only the mock store can be told to fail");
    }
    spac::mock_fail_reads(*model->store, after, count, os_error);
    return SPAC_OK;
}

//
// contexts
//

spac_context * spac_context_new(bool (*user_callback)(void *), void * user_data) {
    auto * context = new (std::nothrow) spac_context;
    if (context) {
        context->user_callback = user_callback;
        context->user_data     = user_data;
        Library::get().pager.add_context(context);
    }
    return context;
}

void spac_context_free(spac_context * context) {
    if (context) {
        Library::get().pager.remove_context(context);
        delete context;
    }
}

bool spac_abort_callback(void * data) {
    auto * context = (spac_context *) data;
    spac::set_current_context(context);
    return context->stopped.load(std::memory_order_acquire) || (context->user_callback && context->user_callback(context->user_data));
}

void spac_cancel(spac_context * context) {
    if (context) {
        context->stop(SPAC_E_CANCELLED, 0, "", 0, 0);
        Library::get().pager.wake();
    }
}

bool spac_context_trim(spac_context * context) {
    return context && context->trim();
}

int spac_context_take_error(spac_context * context, spac_error * error) {
    if (const int code = check_size(error, "spac_error")) {
        return code;
    }
    return !context ? fail(SPAC_E_ARGUMENT, "spac_context_take_error: null") : Library::get().pager.take_error(*context, *error);
}

//
// simulation
//

template <typename Id>
static void count_routing(const Id * ids, int n_layers, int n_used, int n_experts, const int64_t * observations, const int64_t * owners,
                          const double * weights, int64_t n, float * counts) {
    for (int64_t i = 0; i < n; ++i) {
        const Id *  chosen = ids + observations[i] * n_layers * n_used;
        float *     layer  = counts + owners[i] * n_layers * n_experts;
        const float weight = (float) weights[i];
        for (int l = 0; l < n_layers; ++l, chosen += n_used, layer += n_experts) {
            for (int k = 0; k < n_used; ++k) {
                layer[chosen[k]] += weight;
            }
        }
    }
}

int spac_routing_count(const void * ids, int id_bytes, int n_layers, int n_used, int n_experts, const int64_t * observations,
                       const int64_t * owners, const double * weights, int64_t n, float * counts) {
    if (id_bytes == 1) {
        count_routing((const uint8_t *) ids, n_layers, n_used, n_experts, observations, owners, weights, n, counts);
        return SPAC_OK;
    }
    if (id_bytes == 2) {
        count_routing((const uint16_t *) ids, n_layers, n_used, n_experts, observations, owners, weights, n, counts);
        return SPAC_OK;
    }
    return fail(SPAC_E_ARGUMENT, "spac_routing_count: ids have 1 or 2 bytes");
}

int spac_simulate(spac_simulation * s) {
    if (const int code = check_size(s, "spac_simulation")) {
        return code;
    }
    const bool positive = s->n_layers > 0 && s->n_experts > 0 && s->n_experts <= UINT16_MAX && s->n_used > 0 && s->n_bundles > 0;
    if (!positive || (!s->ids && s->n_tokens > 0) || !s->bundle_bytes || s->policy < SPAC_POLICY_DEFAULT || s->policy > SPAC_POLICY_MIN ||
        s->ahead_layers < 0) {
        return fail(SPAC_E_ARGUMENT, "spac_simulation: no routing, no room, or no such policy");
    }
    if (s->layer_bundles && (!s->by_layer || std::accumulate(s->layer_bundles, s->layer_bundles + s->n_layers, uint64_t{ 0 }) != s->n_bundles)) {
        return fail(SPAC_E_ARGUMENT, "spac_simulation: layer_bundles without by_layer, or another sum than n_bundles");
    }
    return guarded([&] {
        spac::simulate(*s);
        return SPAC_OK;
    });
}
