// spac.h - C ABI of libspac: paging of expert weights under a hard byte budget.
//
// Caveats first
//  - All functions may be called from any thread, except that spac_load_begin(), the llama_model_load_*() call and
//    spac_load_end() of one model belong on one thread.
//  - Functions that return int return SPAC_OK or a negative SPAC_E_*; spac_last_error() then holds one line for people.
//  - Nothing here aborts, exits or throws.
//  - Structs start with struct_size: the caller sets it to its own sizeof, the library refuses a size it does not know.
//    spac_struct_size() lets a foreign binding compare every layout when it loads.
//  - The byte budget is one for the whole process and is shared by all models.

#ifndef SPAC_H
#define SPAC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#    define SPAC_API __attribute__((visibility("default")))
#else
#    define SPAC_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SPAC_ABI_VERSION 10
#define SPAC_EVENT_MAX_EXPERTS 32  // a token's experts beyond this many are counted, but not named in its event

enum {
    SPAC_OK          = 0,
    SPAC_E_ARGUMENT  = -1,  // an argument makes no sense (unknown id, wrong struct_size, null)
    SPAC_E_BACKEND   = -2,  // this llama.cpp does not have the three hooks (unpatched, or another version)
    SPAC_E_BUDGET    = -3,  // the budget is below the floor
    SPAC_E_IO        = -4,  // open, stat, map or read failed; errno is in the message
    SPAC_E_CHANGED   = -5,  // a model file was replaced, truncated or written to while in use
    SPAC_E_CANCELLED = -6,  // spac_cancel() was called
    SPAC_E_MEMORY    = -7,  // address space could not be reserved
};

enum {
    SPAC_STORE_AUTO     = 0,  // direct, or buffered where O_DIRECT is refused
    SPAC_STORE_DIRECT   = 1,  // O_DIRECT reads into anonymous memory
    SPAC_STORE_BUFFERED = 2,  // pread through the page cache, which is dropped behind
    SPAC_STORE_MMAP     = 3,  // shared file mapping: the kernel may reclaim and refault, so the budget is best effort
    SPAC_STORE_MOCK     = 4,  // buffered, with failures injected by spac_mock_fail_reads(): for tests
};

// spac_struct_size() takes one of these
enum {
    SPAC_STRUCT_OPTIONS = 0,
    SPAC_STRUCT_INFO    = 1,
    SPAC_STRUCT_STATS   = 2,
    SPAC_STRUCT_EVENT   = 3,
    SPAC_STRUCT_ERROR   = 4,
    SPAC_STRUCT_MEMORY  = 5,
    SPAC_STRUCT_BUNDLE  = 6,
    SPAC_STRUCT_SIMULATION = 7,
    SPAC_STRUCT_ROUTING    = 8,
    SPAC_STRUCT_READS      = 9,
    SPAC_STRUCT_PRODUCTS   = 10,
    SPAC_STRUCT_GAUGE      = 11,
    SPAC_STRUCT_PROBE      = 12,
};

typedef struct spac_context  spac_context;
typedef struct spac_recorder spac_recorder;

// how the next model is to be paged
typedef struct spac_options {
    uint64_t struct_size;
    int32_t  store;         // SPAC_STORE_*
    int32_t  n_io_threads;  // reads in flight; 0: default. One pool serves the process: the largest wish wins
    int32_t  repack;        // 0: leave weights as they are in the file; else repack them as upstream would, unless the store is mmap
    int32_t  reserved;
} spac_options;

typedef struct spac_info {
    uint64_t struct_size;
    uint64_t expert_bytes;       // all expert tensors, as in the file
    uint64_t expert_page_bytes;  // the same in whole pages: a budget of this much holds everything
    uint64_t max_bundle_bytes;   // largest bundle (one expert's tensors in one layer), in whole pages
    uint64_t floor_bytes;        // smallest budget that this model runs in
    int32_t  n_layers;           // layers that have experts
    int32_t  n_experts;          // experts in such a layer (the largest number, should they differ)
    int32_t  n_tensors;          // paged tensors
    int32_t  n_repacked;         // of which the slices are repacked when they are read
    int32_t  store;              // SPAC_STORE_* in use
    int32_t  n_bundles;          // experts of all layers together
} spac_info;

// All counters run from the model's load. A use is one expert in one layer in one ubatch.
typedef struct spac_stats {
    uint64_t struct_size;
    uint64_t budget_bytes;      // of the process, to be used now: what was set, or less while memory is short
    uint64_t used_bytes;        // pages that hold experts or are being read into, all models
    uint64_t peak_bytes;        // largest used_bytes since a model was loaded into an empty process
    uint64_t model_used_bytes;  // this model's part of used_bytes
    uint64_t hits;              // uses whose bundle was wholly resident when its layer began
    uint64_t misses;            // the other uses
    uint64_t reads;             // slices read (a slice: one expert of one tensor)
    uint64_t bytes_read;        // bytes asked of the file, alignment included
    uint64_t evictions;         // slices dropped
    uint64_t rereads;           // slices read again after they had been dropped
    uint64_t read_errors;
    uint64_t stall_ns;          // time that the deciding compute thread slept for a slice
    uint64_t read_ns;           // time inside reads, summed over the reading threads
    uint64_t tokens;            // tokens that passed the first paged layer
    uint64_t ubatches;          // ubatches, likewise
    uint64_t events;            // routing events written so far
    uint64_t ahead_reads;       // of reads: those of guesses
    uint64_t ahead_bytes;       // of bytes_read: likewise
    uint64_t wasted_bytes;      // of ahead_bytes: abandoned, or dropped unused
    uint64_t granted_bytes;     // what spac_budget_set() set
    uint64_t shortages;         // times that memory was short, in this process
} spac_stats;

// Where to look for how much memory is left
typedef struct spac_gauge {
    uint64_t     struct_size;
    const char * folder;          // of a control group, version 1 or 2; or the one that holds "meminfo"
    uint64_t     headroom_bytes;  // what must stay free there
} spac_gauge;

// One token's routing in one layer, in the order in which layers are computed.
typedef struct spac_event {
    uint64_t sequence;          // 0, 1, 2 ... for this model
    uint64_t token;             // running number of the token within this model
    uint64_t stall_ns;          // the model's spac_stats.stall_ns when the layer began: subtract neighbours
    uint32_t hit_mask;          // bit i: experts[i] was wholly resident
    uint16_t layer;             // block number in the model
    uint16_t n_experts;         // experts chosen; the first SPAC_EVENT_MAX_EXPERTS are in experts[]
    uint16_t experts[SPAC_EVENT_MAX_EXPERTS];
} spac_event;

// why a decode stopped
typedef struct spac_error {
    uint64_t struct_size;
    int32_t  code;        // SPAC_OK, SPAC_E_IO, SPAC_E_CHANGED or SPAC_E_CANCELLED
    int32_t  os_error;    // errno, or 0
    uint64_t offset;      // file offset of the read, bytes
    uint64_t length;      // bytes
    char     path[1024];  // the file
} spac_error;

// what a model and a context would take, measured by upstream itself without allocating
typedef struct spac_memory {
    uint64_t struct_size;
    uint64_t dense_bytes;    // weights other than those in the paged buffer type
    uint64_t expert_bytes;   // weights in the paged buffer type, with up to two pages for each tensor
    uint64_t context_bytes;  // KV cache and recurrent state
    uint64_t compute_bytes;  // compute and output buffers
} spac_memory;

typedef struct spac_bundle {
    int32_t layer;     // block number
    int32_t expert;
    int32_t deadline;  // layers until needed; smaller is read first
    float   utility;   // probability that the layer's next token uses it: it may evict only what is worth less
} spac_bundle;

// what a recorder saw in one layer of one ubatch
typedef struct spac_routing {
    uint64_t        struct_size;
    int64_t         n_tokens;  // a model's last layer may compute only tokens whose output is wanted
    int32_t         layer;     // block number
    int32_t         n_used;
    const int32_t * ids;       // [n_tokens][n_used], until the next call
    const float *   weights;   // the same: what the experts' outputs are multiplied with
    double          expert_s;  // from the router's end to the end of the experts' last product
} spac_routing;

// what decides which bundle leaves a simulated cache
enum {
    SPAC_POLICY_DEFAULT = 0,  // the pager's
    SPAC_POLICY_LRU     = 1,
    SPAC_POLICY_LFU     = 2,  // uses since the start
    SPAC_POLICY_STATIC  = 3,  // the most used ones of the whole replay stay
    SPAC_POLICY_S3FIFO  = 4,
    SPAC_POLICY_MIN     = 5,  // Belady's: what is used again last leaves
};

// A replay of routing without weights. Bundles are fetched on demand; those of the layer being computed do not leave.
typedef struct spac_simulation {
    uint64_t         struct_size;
    const uint16_t * ids;           // [n_tokens][n_layers][n_used]: experts; numbers from n_experts on are ignored
    const int32_t *  ubatch;        // [n_tokens]: neighbours with the same number are computed together. NULL: each token alone
    const uint64_t * bundle_bytes;  // [n_layers]
    const float *    foresight;     // [n_tokens][3][n_layers][n_experts]: before each ubatch, of its first token, what
                                    // spac_model_foresee() takes; a negative first number: nothing. SPAC_POLICY_DEFAULT only. Or NULL
    const uint64_t * layer_bundles; // [n_layers]: with by_layer, what there is room for in each; n_bundles is their sum. NULL: equal
    uint64_t         n_tokens;
    uint64_t         n_bundles;     // that there is room for, in all layers together
    int32_t          n_layers;
    int32_t          n_experts;     // in each layer
    int32_t          n_used;        // by a token in a layer
    int32_t          policy;        // SPAC_POLICY_*
    int32_t          by_layer;      // 0: one cache; 1: one for each layer, of n_bundles / n_layers
    int32_t          ahead_layers;  // with foresight: before each layer, what is expected of so many, itself the first, is read while
                                    // the disk is idle, and pushes out what is worth less. 0: nothing is
    double           read_from;     // expected: with at least this probability now
    double           idle_bytes;    // that the disk could read while all of a layer but its experts is computed
    double           idle_use_bytes; // the same for one expert; what is demanded meanwhile is taken off
    // results
    double *         visit_wait_bytes;  // [n_ubatches][n_layers]: to be read when the layer has chosen; or NULL
    double *         visit_ahead_bytes; // the same: read before it has, for it and for later layers; or NULL
    double *         visit_wasted_bytes; // the same: of what was ever read so, what left unused in this visit; or NULL
    uint16_t *       visit_uses;    // [n_ubatches][n_layers]: bundles asked for; room for n_tokens * n_layers, or NULL
    uint16_t *       visit_misses;  // the same: those that were not there
    uint64_t         n_ubatches;
    uint64_t         hits;
    uint64_t         misses;
    uint64_t         bytes;         // of the bundles missed
} spac_simulation;

// what is read into
enum {
    SPAC_PAGES_PAGER   = 0,  // as the pager does: small pages, by way of a huge one where there are some
    SPAC_PAGES_HUGE    = 1,  // a bare read into huge pages: the least that a read can take
    SPAC_PAGES_SMALL   = 2,  // a bare read into small pages from all over memory
    SPAC_PAGES_TOUCHED = 3,  // a bare read into huge pages, of which the thread then touches every line: the least for who uses what it read
};

// Reads of a file, each into memory of its reading thread, as many in flight as there are threads
typedef struct spac_reads {
    uint64_t         struct_size;
    const char *     path;
    const uint64_t * offsets;    // [n_reads]
    const uint64_t * lengths;    // [n_reads], bytes
    int64_t          n_reads;
    int32_t          depth;      // reads in flight
    int32_t          store;      // SPAC_STORE_AUTO, _DIRECT or _BUFFERED (the file's clean pages are dropped from the cache before)
    int32_t          pages;      // SPAC_PAGES_*; they stay from one read to the next
    int32_t          reserved;   // 0
    double           seconds;    // result: from the first one's start to the last one's end; threads and memory are made before
} spac_reads;

// Visits of a layer by the pager, of which the experts are missing: demanded, read and left, in three slices each; nothing is computed
typedef struct spac_visits {
    uint64_t     struct_size;
    const char * path;          // a file of anything, at least three times as large as what a visit reads
    uint64_t     slice_bytes;
    int32_t      n_missing;     // experts of a visit
    int32_t      n_visits;
    int32_t      n_threads;     // that compute
    int32_t      n_io_threads;
    int32_t      store;         // SPAC_STORE_*
    int32_t      reserved;      // 0
    double *     seconds;       // result: [n_visits]
} spac_visits;

// Products of n_tokens tokens with each of n_experts experts (MUL_MAT_ID), on the CPU backend
typedef struct spac_products {
    uint64_t struct_size;
    int64_t  n_columns;
    int64_t  n_rows;
    int32_t  type;       // enum ggml_type
    int32_t  n_experts;  // more of them than the CPU's caches hold, or weights are not read from memory
    int32_t  n_tokens;   // by each expert
    int32_t  n_threads;
    int32_t  n_ops;      // products in a graph, one after another
    int32_t  repack;     // else weights stay as they are in a file
    int32_t  repacked;   // result: this CPU has another layout for the type
    int32_t  reserved;   // 0
    double   min_s;      // repeat at least so long
    double   seconds;    // result: of one product, the median
    double   repack_s;   // result: rearranging all weights, on one thread; 0: not repacked
    const spac_reads * meanwhile;     // or NULL: these, again and again, beside the products for another min_s, half of it
    double             contention_s;  // result: what computing loses for each byte of them
} spac_products;

// What of the kernel's means the stores find here
typedef struct spac_probe {
    uint64_t struct_size;
    uint64_t page_bytes;
    uint64_t direct_align;  // of direct reads of the file, bytes; 0 if they are refused
    int32_t  direct_error;  // errno of that, or 0
    int32_t  populates;     // a mapping can be read in at once (MADV_POPULATE_READ)
} spac_probe;

// -- library --
SPAC_API int          spac_abi_version(void);
SPAC_API size_t       spac_struct_size(int which);  // 0 for an unknown number
SPAC_API const char * spac_last_error(void);        // of the calling thread; "" if none; valid until its next failing call
SPAC_API int          spac_init(void);              // registers with the CPU backend; call before a model loads; idempotent
SPAC_API void *       spac_buffer_type(void);       // ggml_backend_buffer_type_t for tensor_buft_overrides; NULL before spac_init
SPAC_API void         spac_halt(void);              // before the process ends: reads in flight end, and none begins

// -- budget of the process --
SPAC_API int spac_budget_set(uint64_t bytes);  // evicts down to it before it returns; SPAC_E_BUDGET below a loaded model's floor
// Looks from now on, twenty times a second and when tasks wait for memory, whether every gauge leaves its headroom. What is missing is
// taken from the budget at once, down to the floor at most, and given back slowly. n = 0: no longer
SPAC_API int spac_pressure_watch(const spac_gauge * gauges, int n);

// -- models --
SPAC_API int spac_load_begin(const spac_options * options);
SPAC_API int spac_load_end(void);  // the model's id (> 0), 0 if nothing was paged, or a negative error. Call it also if the load failed
SPAC_API int spac_model_info(int model, spac_info * info);
SPAC_API int spac_model_stats(int model, spac_stats * stats);
SPAC_API int spac_model_stats_by_layer(int model, int32_t * layers, uint64_t * hits, uint64_t * misses, int n);  // returns the number of paged layers
// copies events from sequence number `from` on; returns how many; older ones than the ring holds are left out
SPAC_API int spac_model_events(int model, uint64_t from, spac_event * events, int n);
SPAC_API int spac_model_prefetch(int model, const spac_bundle * bundles, int n);  // returns how many reads were queued
// What is known of coming tokens, each [n]: for each layer with experts, in the order of computing, and each of its experts.
//   now    probability that the next ubatch uses it there
//   later  the same of the tokens known after that, each as the first use, times 0.7 for each token after the first of them, summed
//   rest   how much what the pager itself makes of the bundle's past counts beside them
// Steers what is evicted, for two ubatches or until the next call. Absent experts with now >= read_from are read ahead, while no
// demand is being read, into what is worth less. Returns how many reads were queued
SPAC_API int spac_model_foresee(int model, const float * now, const float * later, const float * rest, int n, float read_from);
SPAC_API int spac_model_evict_all(int model);                                     // for measuring cold; returns slices dropped
SPAC_API int spac_mock_fail_reads(int model, int after, int count, int os_error); // SPAC_STORE_MOCK only

// -- contexts: give spac_abort_callback and the handle to llama_context_params, or a failed read is not told --
SPAC_API spac_context * spac_context_new(bool (*user_callback)(void *), void * user_data);  // user_callback may be NULL: chained
SPAC_API void           spac_context_free(spac_context * context);                          // after llama_free
SPAC_API bool           spac_abort_callback(void * context);
SPAC_API void           spac_cancel(spac_context * context);                                // the running or next decode returns 2
// The compute buffer's pages go back to the system, and a graph touches again what it uses. Between decodes, of a living llama_context;
// false: no graph with paged experts was computed since
SPAC_API bool           spac_context_trim(spac_context * context);
SPAC_API int            spac_context_take_error(spac_context * context, spac_error * error); // fills and clears, between decodes; returns error->code

// -- recording: give spac_recorder_callback and the handle to llama_context_params.cb_eval --
SPAC_API spac_recorder * spac_recorder_new(void);
SPAC_API void            spac_recorder_free(spac_recorder * recorder);  // after llama_free
SPAC_API bool            spac_recorder_callback(void * tensor, bool ask, void * recorder);
SPAC_API int             spac_recorder_next(spac_recorder * recorder, spac_routing * routing);  // 1, 0: no more, or negative

// -- what was remembered of routing --
// Adds an observation's weight to each of its experts, for n observations. ids [.., n_layers, n_used], of 1 or 2 bytes: observations[i]
// is a row there, owners[i] one of counts [.., n_layers, n_experts]; none is checked
SPAC_API int spac_routing_count(const void * ids, int id_bytes, int n_layers, int n_used, int n_experts, const int64_t * observations,
                                const int64_t * owners, const double * weights, int64_t n, float * counts);

// -- simulation --
SPAC_API int spac_simulate(spac_simulation * simulation);  // needs no model and no spac_init()

// -- sizes --
// model_params: const struct llama_model_params *, context_params: const struct llama_context_params *
SPAC_API int spac_memory_measure(const char * path, const void * model_params, const void * context_params, spac_memory * memory);

// -- what the device gives --
SPAC_API int spac_stores_probe(const char * path, spac_probe * probe);  // path: a file that is not empty
SPAC_API int spac_reads_measure(spac_reads * test);
SPAC_API int spac_visits_measure(spac_visits * test);
SPAC_API int spac_products_measure(spac_products * test);
SPAC_API int spac_wakeup_measure(int n, double * seconds);  // from a notification to a sleeping thread's going on: median of n
SPAC_API int spac_bandwidth_measure(uint64_t n_bytes, int n_threads, double * bytes_per_s);  // of reading that much memory

#ifdef __cplusplus
}
#endif

#endif
