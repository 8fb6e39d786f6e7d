#include "recorder.h"

#include "error.h"

#include <ggml-backend.h>
#include <ggml.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

enum class Kind { other, ids, weights, output };

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Names are "<what>-<layer>" (llm_graph_context::build_moe_ffn in llama-graph.cpp). Weights are named again after each step
// of normalizing; the last one counts.
Kind kind_of(const ggml_tensor * tensor, int & layer) {
    static constexpr struct { const char * name; Kind kind; } names[] = {
        { "ffn_moe_topk", Kind::ids },
        { "ffn_moe_weights", Kind::weights },
        { "ffn_moe_weights_softmax", Kind::weights },
        { "ffn_moe_weights_norm", Kind::weights },
        { "ffn_moe_weights_scaled", Kind::weights },
        { "ffn_moe_down", Kind::output },
    };
    const char * name = ggml_get_name(tensor), * dash = std::strrchr(name, '-');
    if (!dash) {
        return Kind::other;
    }
    for (const auto & candidate : names) {
        const size_t length = (size_t) (dash - name);
        if (std::strlen(candidate.name) == length && std::strncmp(candidate.name, name, length) == 0) {
            layer = std::atoi(dash + 1);
            return candidate.kind;
        }
    }
    return Kind::other;
}

void read_ids(spac_recorder & recorder, const ggml_tensor * tensor, int layer) {
    if (tensor->type != GGML_TYPE_I32 || tensor->nb[0] != sizeof(int32_t)) {
        ++recorder.n_bad;
        return;
    }
    spac::RoutedLayer routed;
    routed.layer    = layer;
    routed.n_used   = (int) tensor->ne[0];
    routed.n_tokens = tensor->ne[1];
    routed.ids.resize((size_t) ggml_nelements(tensor));
    routed.weights.assign(routed.ids.size(), 0);
    const size_t row_bytes = (size_t) tensor->ne[0] * sizeof(int32_t);
    for (int64_t token = 0; token < routed.n_tokens; ++token) {  // rows of a wider tensor
        ggml_backend_tensor_get(tensor, (char *) routed.ids.data() + (size_t) token * row_bytes, (size_t) token * tensor->nb[1], row_bytes);
    }
    recorder.layers.push_back(std::move(routed));
}

void read_weights(spac_recorder & recorder, const ggml_tensor * tensor, int layer) {
    spac::RoutedLayer * routed = recorder.layers.empty() ? nullptr : &recorder.layers.back();
    if (!routed || routed->layer != layer || tensor->type != GGML_TYPE_F32 || !ggml_is_contiguous(tensor) ||
        (size_t) ggml_nelements(tensor) != routed->weights.size()) {
        ++recorder.n_bad;
        return;
    }
    ggml_backend_tensor_get(tensor, routed->weights.data(), 0, ggml_nbytes(tensor));
}

}  // namespace

spac_recorder * spac_recorder_new(void) {
    return new (std::nothrow) spac_recorder;
}

void spac_recorder_free(spac_recorder * recorder) {
    delete recorder;
}

bool spac_recorder_callback(void * node, bool ask, void * data) {
    auto * tensor   = (ggml_tensor *) node;
    auto & recorder = *(spac_recorder *) data;
    int layer = 0;
    const Kind kind = kind_of(tensor, layer);
    if (ask) {
        return kind != Kind::other;
    }
    try {
        switch (kind) {
            case Kind::ids:     read_ids(recorder, tensor, layer); break;
            case Kind::weights: read_weights(recorder, tensor, layer); break;
            case Kind::output:
                if (!recorder.layers.empty() && recorder.layers.back().layer == layer) {
                    recorder.layers.back().expert_s = now_s() - recorder.routed_at_s;
                }
                break;
            case Kind::other: break;
        }
    } catch (const std::bad_alloc &) {
        ++recorder.n_bad;
    }
    recorder.routed_at_s = now_s();
    return true;
}

int spac_recorder_next(spac_recorder * recorder, spac_routing * routing) {
    if (!recorder || !routing || routing->struct_size != sizeof(spac_routing)) {
        return spac::fail(SPAC_E_ARGUMENT, "spac_routing: struct_size does not match this libspac");
    }
    if (recorder->n_bad > 0) {
        recorder->layers.clear();
        recorder->n_bad = 0;
        return spac::fail(SPAC_E_BACKEND, "routing could not be recorded: this model's router tensors do not look as expected");
    }
    if (recorder->layers.empty()) {
        return 0;
    }
    recorder->taken = std::move(recorder->layers.front());
    recorder->layers.pop_front();
    const spac::RoutedLayer & taken = recorder->taken;
    routing->layer    = taken.layer;
    routing->n_used   = taken.n_used;
    routing->n_tokens = taken.n_tokens;
    routing->ids      = taken.ids.data();
    routing->weights  = taken.weights.data();
    routing->expert_s = taken.expert_s;
    return 1;
}
