// What a model and a context would take, by upstream's own account: a load and a context that allocate nothing.
#include "include/spac.h"

#include "buffer-type.h"
#include "error.h"
#include "ggml-backend.h"
#include "llama-ext.h"
#include "llama.h"

#include <exception>
#include <memory>
#include <string>

namespace {

int measure(const char * path, llama_model_params model_params, const llama_context_params & context_params, spac_memory & memory) {
    model_params.no_alloc  = true;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;
    std::unique_ptr<llama_model, decltype(&llama_model_free)> model(llama_model_load_from_file(path, model_params), llama_model_free);
    if (!model) {
        return spac::fail(SPAC_E_IO, std::string(path) + ": llama.cpp cannot load this model");
    }
    std::unique_ptr<llama_context, decltype(&llama_free)> context(llama_init_from_model(model.get(), context_params), llama_free);
    if (!context) {
        return spac::fail(SPAC_E_ARGUMENT, std::string(path) + ": llama.cpp cannot create a context with these parameters");
    }
    memory = { memory.struct_size, 0, 0, 0, 0 };
    for (const auto & [type, bytes] : llama_get_memory_breakdown(context.get())) {
        (type == spac::buffer_type() ? memory.expert_bytes : memory.dense_bytes) += bytes.model;
        memory.context_bytes += bytes.context;
        memory.compute_bytes += bytes.compute;
    }
    return SPAC_OK;
}

}  // namespace

int spac_memory_measure(const char * path, const void * model_params, const void * context_params, spac_memory * memory) {
    if (!path || !model_params || !context_params || !memory || memory->struct_size != sizeof(spac_memory)) {
        return spac::fail(SPAC_E_ARGUMENT, "spac_memory_measure: bad argument or struct_size");
    }
    try {
        return measure(path, *(const llama_model_params *) model_params, *(const llama_context_params *) context_params, *memory);
    } catch (const std::exception & e) {
        return spac::fail(SPAC_E_MEMORY, std::string(path) + ": " + e.what());
    }
}
