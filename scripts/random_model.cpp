// Writes a small model of any mixture-of-experts architecture that llama.cpp knows, with random weights:
//
//     random_model ARCHITECTURE OUT.gguf [--separate] [--mtp]
//
// Hyperparameters are those of upstream's own fixture (get_gguf_ctx in tests/test-llama-archs.cpp, which CMakeLists.txt cuts
// out into fixture.inc), edited here: 16 experts of which 4 are used, more layers, and what the fixture lacks for some
// architectures. Where llama.cpp takes gate and up fused, they are written fused; --separate writes them apart. With --mtp the
// last block is one that predicts a further token, which llama.cpp does not load by default. Prints the names of the tensors
// that the model's graph multiplies by expert.
#include "fixture.inc"
#include "llama-model.h"

#include <set>

namespace {

struct Options {
    bool separate = false, mtp = false;
};

constexpr uint32_t N_EXPERTS = 16, N_USED = 4, N_GROUPS = 4, N_GROUPS_USED = 2, N_LAYERS = 4;
constexpr uint32_t N_FF = 62, N_FF_CHUNK = 46;  // an expert's part is no multiple of a page

// One architecture's keys.
struct Keys {
    gguf_context * gguf;
    LLM_KV         name;

    Keys(gguf_context * gguf, llm_arch arch) : gguf(gguf), name(arch) {}

    void set(llm_kv key, uint32_t value) { gguf_set_val_u32(gguf, name(key).c_str(), value); }
    void set(llm_kv key, const std::vector<uint32_t> & values) {
        gguf_set_arr_data(gguf, name(key).c_str(), GGUF_TYPE_UINT32, values.data(), values.size());
    }
    uint32_t get(llm_kv key) const { return gguf_get_val_u32(gguf, gguf_find_key(gguf, name(key).c_str())); }
};

// Repeats every array that has an element for each layer until there are n_layers.
void lengthen(Keys & keys, uint32_t n_layers) {
    const uint32_t n_before = keys.get(LLM_KV_BLOCK_COUNT);
    std::vector<std::string> arrays;  // a key that is set moves to the end
    for (int64_t i = 0; i < gguf_get_n_kv(keys.gguf); i++) {
        if (gguf_get_kv_type(keys.gguf, i) == GGUF_TYPE_ARRAY && gguf_get_arr_n(keys.gguf, i) == n_before) {
            arrays.push_back(gguf_get_key(keys.gguf, i));
        }
    }
    for (const std::string & key : arrays) {
        const int64_t i = gguf_find_key(keys.gguf, key.c_str());
        const gguf_type type = gguf_get_arr_type(keys.gguf, i);
        GGML_ASSERT(type == GGUF_TYPE_UINT32 || type == GGUF_TYPE_FLOAT32);
        std::vector<uint32_t> values(n_layers);  // or floats: four bytes either way
        for (uint32_t layer = 0; layer < n_layers; layer++) {
            values[layer] = ((const uint32_t *) gguf_get_arr_data(keys.gguf, i))[layer % n_before];
        }
        gguf_set_arr_data(keys.gguf, key.c_str(), type, values.data(), n_layers);
    }
    keys.set(LLM_KV_BLOCK_COUNT, n_layers);
}

gguf_context_ptr hyperparameters(llm_arch arch, const Options & options) {
    gguf_context_ptr gguf = get_gguf_ctx(arch, /* moe = */ true);
    Keys keys(gguf.get(), arch);
    const uint32_t n_layers = keys.get(LLM_KV_BLOCK_COUNT);
    if (n_layers < N_LAYERS) {
        lengthen(keys, n_layers == 3 ? 2 * n_layers : N_LAYERS);
    }
    if (gguf_get_kv_type(gguf.get(), gguf_find_key(gguf.get(), keys.name(LLM_KV_FEED_FORWARD_LENGTH).c_str())) == GGUF_TYPE_UINT32) {
        keys.set(LLM_KV_FEED_FORWARD_LENGTH, N_FF);
    }
    keys.set(LLM_KV_EXPERT_FEED_FORWARD_LENGTH, N_FF);
    keys.set(LLM_KV_EXPERT_COUNT, N_EXPERTS);
    keys.set(LLM_KV_EXPERT_USED_COUNT, N_USED);
    if (arch == LLM_ARCH_DEEPSEEK2 || arch == LLM_ARCH_BAILINGMOE2 || arch == LLM_ARCH_NEMOTRON_H_MOE) {  // as their models have it
        keys.set(LLM_KV_EXPERT_GROUP_COUNT, N_GROUPS);
        keys.set(LLM_KV_EXPERT_GROUP_USED_COUNT, N_GROUPS_USED);
    }
    keys.set(LLM_KV_EXPERTS_PER_GROUP, uint32_t(2));
    keys.set(LLM_KV_INTERLEAVE_MOE_LAYER_STEP, uint32_t(arch == LLM_ARCH_LLAMA4 ? 2 : 1));
    keys.set(LLM_KV_EXPERT_CHUNK_FEED_FORWARD_LENGTH, N_FF_CHUNK);
    keys.set(LLM_KV_MOE_EVERY_N_LAYERS, uint32_t(2));
    keys.set(LLM_KV_TOKENIZER_TOKEN_TYPE_COUNT, uint32_t(1));
    keys.set(LLM_KV_MOE_LATENT_SIZE, uint32_t(64));
    keys.set(LLM_KV_NEXTN_PREDICT_LAYERS, uint32_t(options.mtp));
    if (arch == LLM_ARCH_GEMMA4) {
        keys.set(LLM_KV_ATTENTION_SLIDING_WINDOW_PATTERN, std::vector<uint32_t>{ 1, 1, 1, 1, 0 });
    }
    return gguf;
}

// Upstream's random weights, but such that different tokens use different experts: embeddings that outweigh what layers add,
// routers with a clear opinion, and next to nothing that is added to all tokens alike before they choose.
void set_data(ggml_tensor * tensor, void *) {
    const bool input  = strstr(tensor->name, "token_embd.weight") || strstr(tensor->name, "ffn_gate_inp.weight") || strstr(tensor->name, "_exps.scale");
    const bool common = strstr(tensor->name, ".bias") && !strstr(tensor->name, "_exps.bias");
    tensor_data_params params = { 1, input ? 1.0f : common ? 0.001f : 0.1f };
    set_tensor_data(tensor, &params);
}

// The tensor's data and, if it is fused and should not be, its two halves: rows of gate, then of up, for each expert.
void add_tensor(gguf_context * out, const ggml_tensor * tensor, const Options & options, std::vector<std::vector<char>> & kept) {
    const std::string name = tensor->name;
    const size_t at = name.find("ffn_gate_up_exps.");
    if (!options.separate || at == std::string::npos) {
        gguf_add_tensor(out, tensor);
        return;
    }
    for (int half = 0; half < 2; half++) {
        ggml_tensor part = *tensor;
        part.ne[1] /= 2;
        part.nb[2] /= 2;
        part.nb[3] /= 2;
        kept.emplace_back(ggml_nbytes(&part));
        for (int64_t expert = 0; expert < part.ne[2]; expert++) {
            memcpy(kept.back().data() + expert * part.nb[2], (const char *) tensor->data + expert * tensor->nb[2] + half * part.nb[2], part.nb[2]);
        }
        part.buffer = nullptr;
        part.data   = kept.back().data();
        ggml_set_name(&part, std::string(name).replace(at, strlen("ffn_gate_up_exps"), half == 0 ? "ffn_gate_exps" : "ffn_up_exps").c_str());
        gguf_add_tensor(out, &part);
    }
}

// Scales of a block that is not loaded: the loader, which made them because they may be there, would not expect them.
bool is_unexpected(const std::string & name, uint32_t n_layers, const Options & options) {
    const std::string block = "blk." + std::to_string(n_layers - 1) + ".";
    return options.mtp && name.compare(0, block.size(), block) == 0 && name.size() > 5 && name.compare(name.size() - 5, 5, "scale") == 0;
}

void write(llm_arch arch, const char * path, const Options & options) {
    gguf_context_ptr gguf = hyperparameters(arch, options);
    llama_model_params params = llama_model_default_params();
    params.load_mtp = options.mtp;
    llama_model_ptr model(llama_model_init_from_user(gguf.get(), set_data, nullptr, params));
    if (!model) {
        throw std::runtime_error("llama.cpp cannot make this model");
    }
    gguf_context_ptr out(gguf_init_empty());
    gguf_set_kv(out.get(), gguf.get());
    const uint32_t n_layers = Keys(gguf.get(), arch).get(LLM_KV_BLOCK_COUNT);
    std::set<std::string> names;  // some are in the list twice: embeddings that are the output too
    std::vector<std::vector<char>> kept;
    for (const auto & [name, tensor] : llama_internal_get_tensor_map(model.get())) {
        if (names.insert(name).second && !is_unexpected(name, n_layers, options)) {
            add_tensor(out.get(), tensor, options, kept);
        }
    }
    if (!gguf_write_to_file(out.get(), path, /* only_meta = */ false)) {
        throw std::runtime_error(std::string(path) + ": cannot be written");
    }
}

bool on_node(ggml_tensor * node, bool ask, void * names) {
    if (ask && node->op == GGML_OP_MUL_MAT_ID) {
        ((std::set<std::string> *) names)->insert(node->src[0]->name);
    }
    return false;
}

// Names of the weights that one token's graph multiplies by expert.
std::set<std::string> multiplied_by_expert(const char * path) {
    std::set<std::string> names;
    llama_model_ptr model(llama_model_load_from_file(path, llama_model_default_params()));
    llama_context_params params = llama_context_default_params();
    params.n_ctx             = 64;
    params.n_threads         = 1;
    params.cb_eval           = on_node;
    params.cb_eval_user_data = &names;
    llama_context_ptr context(model ? llama_init_from_model(model.get(), params) : nullptr);
    llama_token token = 1;
    if (!context || llama_decode(context.get(), llama_batch_get_one(&token, 1)) != 0) {
        throw std::runtime_error("llama.cpp cannot run this model");
    }
    return names;
}

}  // namespace

int main(int argc, char ** argv) {
    const llm_arch arch = argc > 2 ? llm_arch_from_string(argv[1]) : LLM_ARCH_UNKNOWN;
    bool understood = arch != LLM_ARCH_UNKNOWN;
    Options options;
    for (int i = 3; i < argc; i++) {
        options.separate |= strcmp(argv[i], "--separate") == 0;
        options.mtp      |= strcmp(argv[i], "--mtp") == 0;
        understood &= strcmp(argv[i], "--separate") == 0 || strcmp(argv[i], "--mtp") == 0;
    }
    if (!understood) {
        fprintf(stderr, "usage: random_model ARCHITECTURE OUT.gguf [--separate] [--mtp]\n");
        return 2;
    }
    try {
        write(arch, argv[2], options);
        for (const std::string & name : multiplied_by_expert(argv[2])) {
            printf("%s\n", name.c_str());
        }
    } catch (const std::exception & e) {
        fprintf(stderr, "%s: %s\n", argv[1], e.what());
        return 1;
    }
    return 0;
}
