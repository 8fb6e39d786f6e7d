// What rearranging experts' weights for faster kernels costs and gives, one thread: a line for each part, `what ns`. Each part begins and
// ends with a write to no file, which an emulator's log of system calls shows: scripts/repack_cost counts instructions between them.
//
//   repack_cost COLUMNS ROWS

#include "repack.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
#include <vector>

static double now_ns() { return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <typename F> static void part(const char * what, const char * type, int n_tokens, F run) {
    run();  // whatever is done once
    const double begin  = now_ns();
    ssize_t      nobody = write(-1, "begin", 5);
    run();
    nobody += write(-1, "end", 3);
    std::printf("%s %s %d %.0f\n", what, type, n_tokens, now_ns() - begin);
    std::fflush(stdout);
    (void) nobody;
}

int main(int argc, char ** argv) {
    const int64_t columns = argc > 2 ? std::atoi(argv[1]) : 256, rows = argc > 2 ? std::atoi(argv[2]) : 64;
    constexpr int n_experts = 4, n_used = 4;
    ggml_backend_load_all();
    ggml_backend_dev_t cpu     = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_t     backend = ggml_backend_dev_init(cpu, nullptr);
    auto set_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_set_n_threads");
    set_threads(backend, 1);
    spac::Repacker::find(cpu);
    for (ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4}) {
        std::vector<uint8_t> quantised(ggml_row_size(type, columns) * rows * n_experts, 0x31);  // any numbers will do
        for (const bool repacked : {false, true}) {
            for (const int n_tokens : {1, 16}) {
                ggml_context * ctx = ggml_init({ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true});
                ggml_tensor *  w   = ggml_new_tensor_3d(ctx, type, columns, rows, n_experts);
                ggml_tensor *  x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, columns, 1, n_tokens);
                ggml_tensor *  ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_used, n_tokens);
                ggml_tensor *  y   = ggml_mul_mat_id(ctx, w, x, ids);
                std::unique_ptr<spac::Repacker> repacker = spac::Repacker::make(*w);
                if (repacked && !repacker) {
                    ggml_free(ctx);
                    break;
                }
                ggml_backend_buffer_type_t buft    = repacked ? spac::repack_buffer_type(cpu) : ggml_backend_cpu_buffer_type();
                ggml_backend_buffer_t      weights = ggml_backend_buft_alloc_buffer(buft, quantised.size() + 64);
                ggml_backend_tensor_alloc(weights, w, ggml_backend_buffer_get_base(weights));
                ggml_backend_tensor_set(w, quantised.data(), 0, quantised.size());
                ggml_backend_buffer_t rest = ggml_backend_alloc_ctx_tensors(ctx, backend);
                std::vector<int32_t>  chosen((size_t) n_used * n_tokens);
                for (size_t i = 0; i < chosen.size(); ++i) {
                    chosen[i] = (int32_t) (i % n_experts);
                }
                ggml_backend_tensor_set(ids, chosen.data(), 0, chosen.size() * sizeof(int32_t));
                const std::vector<float> values((size_t) columns * n_tokens, 0.5f);
                ggml_backend_tensor_set(x, values.data(), 0, values.size() * sizeof(float));
                ggml_cgraph * graph = ggml_new_graph(ctx);
                ggml_build_forward_expand(graph, y);
                part(repacked ? "repacked" : "plain", ggml_type_name(type), n_tokens, [&] { ggml_backend_graph_compute(backend, graph); });
                if (repacked && n_tokens == 1) {
                    part("repacking", ggml_type_name(type), 1, [&] {
                        for (int e = 0; e < n_experts; ++e) {
                            uint8_t * slice = quantised.data() + e * quantised.size() / n_experts;
                            repacker->put(slice, slice, quantised.size() / n_experts);
                        }
                    });
                }
                ggml_backend_buffer_free(rest);
                ggml_backend_buffer_free(weights);
                ggml_free(ctx);
            }
        }
    }
    ggml_backend_free(backend);
}
