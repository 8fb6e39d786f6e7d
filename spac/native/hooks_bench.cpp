// What the hooks cost when every expert is in memory: the same graph of MUL_MAT_ID ops on plain and on paged weights, in turn.
//
//   cmake --build build/native --target hooks_bench && build/native/bin/hooks_bench > docs/benchmarks/hooks.md
//
// A layer is three ops (up, gate, down) on Q4_0 weights [2048, rows, 16 experts], 8 experts used, one token: what decoding does.
#include "include/spac.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "library.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <unistd.h>

namespace {

constexpr int     n_layers = 4, n_experts = 16, n_used = 8, n_rounds = 300;
constexpr int64_t width    = 2048;

int last_model_id = 0;

double now_ns() {
    return (double) std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

void check(bool ok, const char * what) {
    if (!ok) {
        std::fprintf(stderr, "hooks_bench: %s: %s\n", what, spac_last_error());
        std::exit(1);
    }
}

// A graph of n_layers x 3 ops; the weights are in plain memory, or paged from a file of zeros.
struct Graph {
    ggml_context *        context;
    ggml_backend_buffer_t buffer;
    ggml_cgraph *         graph;
    std::vector<uint8_t>  work;
    ggml_cplan            plan;

    Graph(int64_t rows, int n_threads, const char * path) {
        const ggml_init_params params = { 256 * 1024, nullptr, true };
        context = ggml_init(params);
        graph   = ggml_new_graph(context);
        std::vector<ggml_tensor *> weights;
        for (int layer = 0; layer < n_layers; ++layer) {
            for (const char * part : { "up", "gate", "down" }) {
                weights.push_back(ggml_new_tensor_3d(context, GGML_TYPE_Q4_0, width, rows, n_experts));
                ggml_format_name(weights.back(), "blk.%d.ffn_%s_exps.weight", layer, part);
            }
        }
        buffer = path ? bind(weights, path) : ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_cpu_buffer_type());
        if (!path) {
            ggml_backend_buffer_clear(buffer, 0);
        }
        ggml_tensor * input = ggml_new_tensor_3d(context, GGML_TYPE_F32, width, 1, 1);
        ggml_tensor * ids   = ggml_new_tensor_2d(context, GGML_TYPE_I32, n_used, 1);
        for (ggml_tensor * weight : weights) {
            ggml_build_forward_expand(graph, ggml_mul_mat_id(context, weight, input, ids));
        }
        for (ggml_tensor * t = ggml_get_first_tensor(context); t; t = ggml_get_next_tensor(context, t)) {
            if (!t->data) {
                t->data = std::aligned_alloc(64, (ggml_nbytes(t) + 63) / 64 * 64);
            }
        }
        std::fill_n((float *) input->data, width, 1.0f);
        for (int i = 0; i < n_used; ++i) {
            ((int32_t *) ids->data)[i] = 2 * i;
        }
        plan = ggml_graph_plan(graph, n_threads, nullptr);
        work.resize(plan.work_size);
        plan.work_data = work.data();
    }

    ~Graph() { ggml_backend_buffer_free(buffer); }  // the small tensors are left to the end of the process

    static ggml_backend_buffer_t bind(const std::vector<ggml_tensor *> & weights, const char * path) {
        const spac_options options = { sizeof(spac_options), SPAC_STORE_AUTO, 0 };
        auto * buft = (ggml_backend_buffer_type_t) spac_buffer_type();
        size_t size = 0;
        for (ggml_tensor * weight : weights) {
            size += ggml_backend_buft_get_alloc_size(buft, weight);
        }
        check(truncate(path, (off_t) size) == 0, path);
        check(spac_load_begin(&options) == SPAC_OK, "spac_load_begin");
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft, size);
        char * at = (char *) ggml_backend_buffer_get_base(buffer);
        size_t offset = 0;
        for (ggml_tensor * weight : weights) {
            ggml_backend_tensor_alloc(buffer, weight, at);
            at += ggml_backend_buft_get_alloc_size(buft, weight);
            check(ggml_backend_tensor_bind_file(weight, path, offset, ggml_nbytes(weight)), "bind");
            offset += ggml_nbytes(weight);
        }
        last_model_id = spac_load_end();
        check(last_model_id > 0, "spac_load_end");
        return buffer;
    }

    double op_ns() {
        const double begin = now_ns();
        ggml_graph_compute(graph, &plan);
        return (now_ns() - begin) / (3 * n_layers);
    }
};

// The hooks alone, on one thread, without arithmetic.
void time_hooks(const Graph & paged) {
    auto & pager = spac::Library::get().pager;
    std::vector<double> begin_op[2], expert;  // begin_op of a layer's first tensor, and of the others
    spac::Model & model = *spac::Library::get().find(last_model_id);
    std::vector<int64_t> rows(n_experts, 0);
    std::vector<int32_t> order(n_experts);
    const ggml_tensor * ids = ggml_graph_node(paged.graph, 0)->src[2];
    for (int i = 0; i < n_used; ++i) {
        rows[2 * i] = 1;
    }
    const spac::Routing routing = { (const char *) ids->data, 1, n_used, ids->nb[1], ids->nb[0] };
    for (int round = 0; round < 20 * n_rounds; ++round) {
        for (auto & tensor : model.tensors) {
            double begin = now_ns();
            spac::Op * op = pager.begin_op(*tensor, nullptr, rows.data(), order.data(), 1, routing);
            begin_op[tensor->part > 0].push_back(now_ns() - begin);
            begin = now_ns();
            for (int i = 0; i < n_used; ++i) {
                pager.begin_expert(*op, order[i]);
                pager.end_expert(*op, order[i]);
            }
            expert.push_back((now_ns() - begin) / n_used);
        }
    }
    std::printf("One thread, no arithmetic, %d experts used, medians: begin_op %.0f ns for the first tensor of a layer (routing is scored and\n"
                "its event written) and %.0f ns for the others; begin_expert and end_expert together %.0f ns for each expert.\n",
                n_used, median(begin_op[0]), median(begin_op[1]), median(expert));
}

}  // namespace

int main() {
    char path[] = "/tmp/spac-hooks-XXXXXX";
    close(mkstemp(path));
    check(spac_init() == SPAC_OK, "spac_init");
    check(spac_budget_set(4ull << 30) == SPAC_OK, "spac_budget_set");
    std::printf("| threads | expert slice | plain op | paged op | difference | of the op |\n|---|---|---|---|---|---|\n");
    for (int n_threads : { 1, 2 }) {
        for (int64_t rows : { 64, 256, 768, 2048 }) {
            Graph plain(rows, n_threads, nullptr), paged(rows, n_threads, path);
            std::vector<double> a, b, difference;
            for (int round = -10; round < n_rounds; ++round) {
                const double plain_ns = plain.op_ns(), paged_ns = paged.op_ns();
                if (round >= 0) {
                    a.push_back(plain_ns);
                    b.push_back(paged_ns);
                    difference.push_back(paged_ns - plain_ns);
                }
            }
            std::printf("| %d | %.0f KiB | %.1f us | %.1f us | %+.2f us | %+.2f %% |\n", n_threads, (double) rows * width * 18 / 32 / 1024,
                        median(a) / 1e3, median(b) / 1e3, median(difference) / 1e3, 100 * median(difference) / median(a));
        }
    }
    std::printf("\n");
    Graph paged(64, 1, path);
    paged.op_ns();
    time_hooks(paged);
    unlink(path);
    return 0;
}
