// The hooks in ggml's own MUL_MAT_ID: outputs on paged weights are bit for bit those on plain weights.
#include "include/spac.h"
#include "buffer-type.h"
#include "repack.h"
#include "testing.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr int n_layers = 3, n_experts = 8, n_used = 3;

struct Shape {
    int64_t width = 256, rows = 96;
};

// Weights of all layers, one tensor after the other, in a file that begins with some other bytes.
struct WeightFile {
    static constexpr size_t offset = 12 * 1024 + 32;

    std::string          path = "/tmp/spac-graph-XXXXXX";
    std::vector<uint8_t> bytes;
    Shape                shape;
    size_t               tensor_bytes;

    explicit WeightFile(ggml_type type, Shape shape = {}) :
        shape(shape), tensor_bytes(ggml_row_size(type, shape.width) * shape.rows * n_experts) {
        // some types take long to quantise: rows are drawn from a few
        const int    n_rows    = 64;
        const size_t row_bytes = ggml_row_size(type, shape.width);
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        std::vector<float> values((size_t) shape.width * n_rows);
        for (float & value : values) {
            value = normal(random);
        }
        const std::vector<float> importance((size_t) shape.width, 1.0f);  // some want to be told which columns matter
        std::vector<uint8_t>     quantised(n_rows * row_bytes);
        ggml_quantize_chunk(type, values.data(), quantised.data(), 0, n_rows, shape.width,
                            ggml_quantize_requires_imatrix(type) ? importance.data() : nullptr);
        bytes.resize(3 * n_layers * tensor_bytes);
        for (size_t at = 0; at < bytes.size(); at += row_bytes) {
            std::memcpy(&bytes[at], &quantised[random() % n_rows * row_bytes], row_bytes);
        }
        const int fd = mkstemp(path.data());
        REQUIRE(fd >= 0);
        REQUIRE(pwrite(fd, bytes.data(), bytes.size(), offset) == (ssize_t) bytes.size());
        close(fd);
    }
    ~WeightFile() { unlink(path.c_str()); }
};

struct Graph {
    std::unique_ptr<ggml_context, decltype(&ggml_free)> context{ nullptr, ggml_free };
    ggml_backend_buffer_t            weights_buffer = nullptr, data_buffer = nullptr;
    ggml_cgraph *                    graph = nullptr;
    ggml_tensor *                    input = nullptr, * ids = nullptr;
    int                              model = 0;

    // store: SPAC_STORE_*, or -1 for weights that stay in memory
    Graph(const WeightFile & file, ggml_type type, int n_tokens, int store, bool repack) {
        context.reset(ggml_init({ 512 * 1024, nullptr, true }));
        std::vector<ggml_tensor *> weights;
        for (int layer = 0; layer < n_layers; ++layer) {
            for (const char * part : { "up", "gate", "down" }) {
                weights.push_back(ggml_new_tensor_3d(context.get(), type, file.shape.width, file.shape.rows, n_experts));
                ggml_format_name(weights.back(), "blk.%d.ffn_%s_exps.weight", layer, part);
            }
        }
        auto * buft = store >= 0 ? (ggml_backend_buffer_type_t) spac_buffer_type() :
                      repack     ? spac::repack_buffer_type(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) :  // upstream's own
                                   ggml_backend_cpu_buffer_type();
        size_t size = 0;
        for (ggml_tensor * weight : weights) {
            size += ggml_backend_buft_get_alloc_size(buft, weight);
        }
        const spac_options options = { sizeof(spac_options), store, 3, repack, 0 };
        if (store >= 0) {
            REQUIRE(spac_load_begin(&options) == SPAC_OK);
        }
        weights_buffer = ggml_backend_buft_alloc_buffer(buft, size);
        char * at = (char *) ggml_backend_buffer_get_base(weights_buffer);
        for (size_t i = 0; i < weights.size(); ++i) {
            ggml_backend_tensor_alloc(weights_buffer, weights[i], at);
            at += ggml_backend_buft_get_alloc_size(buft, weights[i]);
            if (store < 0) {
                ggml_backend_tensor_set(weights[i], file.bytes.data() + i * file.tensor_bytes, 0, file.tensor_bytes);
            } else {
                REQUIRE(ggml_backend_tensor_bind_file(weights[i], file.path.c_str(), WeightFile::offset + i * file.tensor_bytes, file.tensor_bytes));
            }
        }
        if (store >= 0) {
            model = spac_load_end();
            REQUIRE_MESSAGE(model > 0, spac_last_error());
        }
        graph = ggml_new_graph(context.get());
        input = ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, file.shape.width, 1, n_tokens);
        ids   = ggml_new_tensor_2d(context.get(), GGML_TYPE_I32, n_used, n_tokens);
        for (ggml_tensor * weight : weights) {
            ggml_build_forward_expand(graph, ggml_mul_mat_id(context.get(), weight, input, ids));
        }
        data_buffer = ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type());
    }

    ~Graph() {
        ggml_backend_buffer_free(data_buffer);
        ggml_backend_buffer_free(weights_buffer);
    }

    // All outputs for inputs and routes drawn from a seed.
    std::vector<float> compute(unsigned seed, int n_threads) {
        draw(seed);
        return compute(n_threads);
    }

    void draw(unsigned seed) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < ggml_nelements(input); ++i) {
            ((float *) input->data)[i] = normal(random);
        }
        for (int64_t token = 0; token < ids->ne[1]; ++token) {
            const int first = (int) (random() % n_experts);
            for (int i = 0; i < n_used; ++i) {
                ((int32_t *) ids->data)[token * n_used + i] = (first + i * 3) % n_experts;
            }
        }
    }

    std::vector<float> compute(int n_threads) {
        static const std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)> cpu(
            ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr), ggml_backend_free);
        auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get())), "ggml_backend_set_n_threads");
        set_n_threads(cpu.get(), n_threads);
        REQUIRE(ggml_backend_graph_compute(cpu.get(), graph) == GGML_STATUS_SUCCESS);
        std::vector<float> result;
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            const ggml_tensor * node = ggml_graph_node(graph, i);
            result.insert(result.end(), (const float *) node->data, (const float *) node->data + ggml_nelements(node));
        }
        return result;
    }
};

bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("outputs are bit-equal at the floor budget: types, repacked or not, stores, tokens, threads") {
    REQUIRE(spac_init() == SPAC_OK);
    for (const auto & [type, repack] : { std::pair(GGML_TYPE_F16, false), std::pair(GGML_TYPE_Q4_0, false), std::pair(GGML_TYPE_Q4_K, false),
                                         std::pair(GGML_TYPE_Q4_0, true), std::pair(GGML_TYPE_Q4_K, true) }) {
        const WeightFile file(type);
        for (const int n_tokens : { 1, 5, 40 }) {
            const unsigned n_seeds = n_tokens < 40 ? 3 : 1;  // more tokens draw more routes; and this test also runs emulated
            std::map<std::tuple<bool, int, unsigned>, std::vector<float>> known;
            const auto reference = [&](bool repacked, int n_threads, unsigned seed) -> const std::vector<float> & {
                std::vector<float> & result = known[{ repacked, n_threads, seed }];
                if (result.empty()) {
                    result = Graph(file, type, n_tokens, -1, repacked).compute(seed, n_threads);
                }
                return result;
            };
            for (const int store : { SPAC_STORE_AUTO, SPAC_STORE_BUFFERED, SPAC_STORE_MMAP, SPAC_STORE_MOCK }) {
                REQUIRE(spac_budget_set(64 << 20) == SPAC_OK);
                Graph paged(file, type, n_tokens, store, repack);
                spac_info info{};
                info.struct_size = sizeof info;
                REQUIRE(spac_model_info(paged.model, &info) == SPAC_OK);
                REQUIRE(spac_budget_set(info.floor_bytes) == SPAC_OK);
                CHECK((info.n_repacked == 0 || (repack && store != SPAC_STORE_MMAP)));
                for (const int n_threads : { 1, 2, 4 }) {
                    CAPTURE(ggml_type_name(type));
                    CAPTURE(n_tokens);
                    CAPTURE(store);
                    CAPTURE(n_threads);
                    for (unsigned seed = 0; seed < n_seeds; ++seed) {
                        CHECK(same_bits(paged.compute(seed, n_threads), reference(info.n_repacked > 0, n_threads, seed)));
                    }
                }
                spac_stats stats{};
                stats.struct_size = sizeof stats;
                REQUIRE(spac_model_stats(paged.model, &stats) == SPAC_OK);
                CHECK(stats.evictions > 0);
                CHECK(stats.peak_bytes <= stats.budget_bytes);
            }
        }
    }
}

#ifdef SPAC_LINKS_CPU_BACKEND
// The types are those of upstream's own table, so that one that comes with a newer upstream is tested without being named here.
TEST_CASE("outputs are bit-equal at the floor budget: every type that the CPU backend multiplies, slices that are not whole pages") {
    REQUIRE(spac_init() == SPAC_OK);
    int n_types = 0, n_repacked = 0;
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        const ggml_type type = (ggml_type) t;
        if (ggml_blck_size(type) == 0 || !ggml_get_type_traits_cpu(type)->vec_dot) {
            continue;  // removed, or never that of weights
        }
        CAPTURE(ggml_type_name(type));
        const Shape shape = { ggml_blck_size(type) > 64 ? 256 : 320, 104 };
        REQUIRE((ggml_row_size(type, shape.width) * shape.rows) % (size_t) sysconf(_SC_PAGESIZE) != 0);
        const WeightFile file(type, shape);
        for (const bool repack : { false, true }) {
            REQUIRE(spac_budget_set(64 << 20) == SPAC_OK);
            Graph paged(file, type, 33, SPAC_STORE_AUTO, repack);
            spac_info info{};
            info.struct_size = sizeof info;
            REQUIRE(spac_model_info(paged.model, &info) == SPAC_OK);
            if (repack && info.n_repacked == 0) {
                continue;  // this CPU has no other layout for it
            }
            REQUIRE(spac_budget_set(info.floor_bytes) == SPAC_OK);
            Graph plain(file, type, 33, -1, repack);
            for (unsigned seed = 0; seed < 2; ++seed) {
                const std::vector<float> expected = plain.compute(seed, 1 + (int) seed);
                CHECK(std::all_of(expected.begin(), expected.end(), [](float x) { return std::isfinite(x); }));
                CHECK(std::any_of(expected.begin(), expected.end(), [](float x) { return x != 0.0f; }));
                CHECK(same_bits(paged.compute(seed, 1 + (int) seed), expected));
            }
            spac_stats stats{};
            stats.struct_size = sizeof stats;
            REQUIRE(spac_model_stats(paged.model, &stats) == SPAC_OK);
            CHECK(stats.evictions > 0);
            CHECK(stats.rereads > 0);
            CHECK(stats.peak_bytes <= stats.budget_bytes);
            (repack ? n_repacked : n_types) += 1;
        }
    }
    MESSAGE(n_types, " types, ", n_repacked, " of them repacked too");
    CHECK(n_types > 0);
}
#endif

TEST_CASE("repacked weights: a token's results are the same in a batch, where four rows of an expert are multiplied at once, and alone") {
    REQUIRE(spac_init() == SPAC_OK);
    REQUIRE(spac_budget_set(64 << 20) == SPAC_OK);
    int n_types = 0;
    for (const ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K }) {
        const WeightFile file(type);
        constexpr int    n_tokens = 23;
        Graph            batch(file, type, n_tokens, SPAC_STORE_AUTO, true), alone(file, type, 1, SPAC_STORE_AUTO, true);
        spac_info        info{};
        info.struct_size = sizeof info;
        REQUIRE(spac_model_info(alone.model, &info) == SPAC_OK);
        if (info.n_repacked == 0) {
            continue;  // this CPU has no other layout for it
        }
        ++n_types;
        for (const int n_threads : { 1, 3 }) {
            batch.compute(1, n_threads);
            for (int token = 0; token < n_tokens; ++token) {
                const auto same_token = [&](ggml_tensor * of_batch, ggml_tensor * of_one, bool copy) {
                    char * const slice = (char *) of_batch->data + token * ggml_nbytes(of_one);
                    if (copy) {
                        std::memcpy(of_one->data, slice, ggml_nbytes(of_one));
                    }
                    return std::memcmp(of_one->data, slice, ggml_nbytes(of_one)) == 0;
                };
                same_token(batch.input, alone.input, true);
                same_token(batch.ids, alone.ids, true);
                alone.compute(n_threads);
                for (int node = 0; node < ggml_graph_n_nodes(alone.graph); ++node) {
                    INFO(ggml_type_name(type), ", ", n_threads, " threads, token ", token, ", node ", node);
                    REQUIRE(same_token(ggml_graph_node(batch.graph, node), ggml_graph_node(alone.graph, node), false));
                }
            }
        }
    }
    MESSAGE(n_types, " types");
}

TEST_CASE("a context gives back what is in memory of its compute buffer, once, and the next graph is computed in it as before") {
    REQUIRE(spac_init() == SPAC_OK);
    REQUIRE(spac_budget_set(64 << 20) == SPAC_OK);
    const WeightFile file(GGML_TYPE_Q4_0);
    Graph            graph(file, GGML_TYPE_Q4_0, 256, SPAC_STORE_AUTO, false);
    uint8_t * const  base = (uint8_t *) ggml_backend_buffer_get_base(graph.data_buffer);
    const size_t     size = ggml_backend_buffer_get_size(graph.data_buffer), page = (size_t) sysconf(_SC_PAGESIZE);
    const auto       resident_pages = [&] {
        uint8_t * const      first = (uint8_t *) ((uintptr_t) base / page * page);
        std::vector<uint8_t> pages((size_t) (base + size - first + page - 1) / page);
        REQUIRE(mincore(first, pages.size() * page, pages.data()) == 0);
        return std::count_if(pages.begin(), pages.end(), [](uint8_t p) { return p & 1; });
    };
    spac_context * context = spac_context_new(nullptr, nullptr);
    CHECK(!spac_context_trim(nullptr));
    CHECK(!spac_abort_callback(context));  // as llama.cpp calls it: this thread computes for this context
    graph.compute(1, 2);
    CHECK(!spac_context_trim(context));  // not a compute buffer
    ggml_backend_buffer_set_usage(graph.data_buffer, GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    const std::vector<float> before = graph.compute(1, 2);
    CHECK(resident_pages() > 16);
    CHECK(spac_context_trim(context));
    CHECK(resident_pages() <= 2);        // its ends, shared with others' memory
    CHECK(!spac_context_trim(context));  // given back already
    CHECK(same_bits(graph.compute(1, 2), before));
    CHECK(spac_context_trim(context));
    spac::set_current_context(nullptr);
    spac_context_free(context);
}
