#include "buffer-type.h"

#include "error.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "library.h"
#include "traits.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

// The base classes' destructors live in libggml-cpu, which is a module that cannot be linked to in some builds.
namespace ggml::cpu {
tensor_traits::~tensor_traits() {}
extra_buffer_type::~extra_buffer_type() {}
}  // namespace ggml::cpu

namespace spac {

namespace {

// One model's paged tensors. Their addresses are reserved and mean nothing but their names: what is there lies in slots.
struct Buffer {
    std::shared_ptr<Model> model;
    uint8_t * base = nullptr;
    size_t    size = 0;
    std::unordered_map<const void *, PagedTensor *> tensors;  // by tensor->data; not changed after the load
};

//
// names: blk.N.ffn_{gate,up,down,gate_up}_{,ch}exps.weight
//

struct Name {
    int  layer = -1;
    int  rank  = 0;      // of use within the layer
    bool chunk = false;  // "chexps": a second set of experts in the same layer, with ids of its own
};

bool parse_name(const char * text, Name & name) {
    char part[32];
    int  end = 0;
    if (std::sscanf(text, "blk.%d.ffn_%31[a-z_].weight%n", &name.layer, part, &end) != 2 || end == 0 || text[end] != '\0') {
        return false;
    }
    for (const char * stem : { "gate", "up", "down", "gate_up" }) {
        const std::string exps = std::string(stem) + "_exps", chexps = std::string(stem) + "_chexps";
        if (part == exps || part == chexps) {
            name.rank  = std::strcmp(stem, "down") == 0 ? 1 : 0;
            name.chunk = part == chexps;
            return true;
        }
    }
    return false;
}

Group & group_of(Model & model, const Name & name) {
    const int key = 2 * name.layer + (name.chunk ? 1 : 0);
    for (auto & group : model.groups) {
        if (group->key == key) {
            return *group;
        }
    }
    model.groups.push_back(std::make_unique<Group>());
    model.groups.back()->key   = key;
    model.groups.back()->layer = name.layer;
    return *model.groups.back();
}

ModelFile * file_of(Model & model, const char * given) {
    std::error_code none;
    const std::filesystem::path whole = std::filesystem::absolute(given, none);  // it is looked at again, wherever the process is then
    const std::string path = none ? std::string(given) : whole.string();
    for (auto & file : model.files) {
        if (file->path == path) {
            return file.get();
        }
    }
    Library & library  = Library::get();
    int       os_error = 0;
    if (!model.store) {
        model.store = open_store(library.load_options().store, path, os_error);
    }
    auto file  = std::make_unique<ModelFile>();
    file->path = path;
    if (model.store) {
        os_error = model.store->open(*file);
    }
    if (os_error != 0) {
        library.load_failed(SPAC_E_IO, os_message(path, os_error == EINVAL ? "this file system refuses direct I/O (use another store)" :
                                                                             "cannot be opened for paging", os_error));
        return nullptr;
    }
    model.files.push_back(std::move(file));
    return model.files.back().get();
}

//
// buffer
//

void buffer_free(ggml_backend_buffer_t buffer) {
    Buffer * b = (Buffer *) buffer->context;
    if (b) {
        Library::get().forget(b->model);
        munmap(b->base, b->size);
        delete b;
    }
}

void * buffer_get_base(ggml_backend_buffer_t buffer) {
    Buffer * b = (Buffer *) buffer->context;
    return b ? b->base : nullptr;
}

void buffer_memset_tensor(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t) {}

void buffer_set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void *, size_t, size_t) {
    Library::get().load_failed(SPAC_E_BACKEND, std::string(tensor->name) + ": a paged tensor takes its data from a file only");
}

// Rarely wanted (saving a model): straight from the file.
void buffer_get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    const Buffer * b = (const Buffer *) buffer->context;
    const auto it = b->tensors.find(tensor->data);
    std::memset(data, 0, size);
    if (it == b->tensors.end()) {
        return;
    }
    const int fd = open(it->second->file->path.c_str(), O_RDONLY | O_CLOEXEC);
    for (size_t done = 0; fd >= 0 && done < size;) {
        const ssize_t n = pread(fd, (char *) data + done, size - done, (off_t) (it->second->offset + offset + done));
        if (n <= 0) {
            break;
        }
        done += (size_t) n;
    }
    if (fd >= 0) {
        close(fd);
    }
}

void buffer_clear(ggml_backend_buffer_t, uint8_t) {}

bool buffer_bind_file(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const char * path, size_t offset, size_t size) {
    Buffer *  b       = (Buffer *) buffer->context;
    Library & library = Library::get();
    Name      name;
    if (!parse_name(tensor->name, name) || tensor->ne[2] < 1 || tensor->ne[3] != 1 || (size_t) tensor->ne[2] * tensor->nb[2] != size) {
        library.load_failed(SPAC_E_ARGUMENT, std::string(tensor->name) + ": not an expert tensor, it cannot be paged");
        return true;
    }
    ModelFile * file = file_of(*b->model, path);
    if (!file) {
        return true;
    }
    if (offset > file->size || size > file->size - offset) {
        library.load_failed(SPAC_E_IO, std::string(path) + ": the file ends before tensor " + tensor->name + " does");
        return true;
    }
    auto paged         = std::make_unique<PagedTensor>();
    paged->name        = tensor->name;
    paged->group       = &group_of(*b->model, name);
    paged->rank        = name.rank;
    paged->n_experts   = (int) tensor->ne[2];
    paged->slice_bytes = tensor->nb[2];
    paged->file        = file;
    paged->offset      = offset;
    if (!b->model->store->maps()) {  // a mapping of the file stays as it is
        paged->repacker = library.load_options().repack ? Repacker::make(*tensor) : nullptr;
        tensor->extra   = paged->repacker ? paged->repacker->traits() : nullptr;
    }
    b->tensors[tensor->data] = paged.get();
    b->model->tensors.push_back(std::move(paged));
    return true;
}

const ggml_backend_buffer_i buffer_interface = {
    /* .free_buffer   = */ buffer_free,
    /* .get_base      = */ buffer_get_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ buffer_memset_tensor,
    /* .set_tensor    = */ buffer_set_tensor,
    /* .get_tensor    = */ buffer_get_tensor,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ buffer_clear,
    /* .reset         = */ nullptr,
    /* .bind_file     = */ buffer_bind_file,
};

//
// buffer type
//

const char * buft_get_name(ggml_backend_buffer_type_t) {
    return "CPU_PAGED";
}

ggml_backend_buffer_t buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    if (size == 0) {  // a probe, or a load that allocates nothing
        return ggml_backend_buffer_init(buft, buffer_interface, nullptr, 0);
    }
    auto model = Library::get().loading();
    if (!model) {
        GGML_LOG_ERROR("%s: spac_load_begin() was not called\n", __func__);
        return nullptr;
    }
    void * base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        Library::get().load_failed(SPAC_E_MEMORY, "no " + std::to_string(size) + " bytes of address space for the experts: " +
                                                      std::strerror(errno) + " (see ulimit -v)");
        return nullptr;
    }
    auto * b = new Buffer{ model, (uint8_t *) base, size, {} };
    return ggml_backend_buffer_init(buft, buffer_interface, b, size);
}

size_t buft_get_alignment(ggml_backend_buffer_type_t) {
    return 64;
}

class PagedBufferType : public ggml::cpu::extra_buffer_type {
    // The loader probes with an empty buffer whether a weight may be placed here by itself: never, only by an override. The
    // empty buffer of a load that allocates nothing is marked as holding weights.
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * weights = op->src[0];
        return op->op == GGML_OP_MUL_MAT_ID && weights && weights->buffer && weights->buffer->buft == buffer_type() &&
               (weights->buffer->size > 0 || weights->buffer->usage == GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    // Stock kernels do all the arithmetic: those for repacked weights, or, without traits, the plain ones.
    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        const ggml_tensor * weights = op->op == GGML_OP_MUL_MAT_ID ? op->src[0] : nullptr;
        return weights && weights->buffer && weights->buffer->buft == buffer_type() ? (ggml::cpu::tensor_traits *) weights->extra :
                                                                                        nullptr;
    }
};

//
// MUL_MAT_ID
//

thread_local spac_context * current_context = nullptr;

void * on_begin_op(const ggml_tensor * dst, const int64_t * row_counts, int32_t * order, int n_threads) {
    const ggml_tensor *   weights = dst->src[0];
    ggml_backend_buffer_t buffer  = weights->view_src ? weights->view_src->buffer : weights->buffer;
    if (!buffer || buffer->buft != buffer_type()) {
        return nullptr;
    }
    const Buffer * b  = (const Buffer *) buffer->context;
    const auto     it = b->tensors.find(weights->data);
    if (it == b->tensors.end()) {
        return nullptr;
    }
    if (current_context && dst->buffer && dst->buffer->usage == GGML_BACKEND_BUFFER_USAGE_COMPUTE) {
        current_context->computes_in(ggml_backend_buffer_get_base(dst->buffer), ggml_backend_buffer_get_size(dst->buffer));
    }
    const ggml_tensor * ids = dst->src[2];
    const Routing routing = { (const char *) ids->data, ids->ne[1], (int) ids->ne[0], ids->nb[1], ids->nb[0] };
    return Library::get().pager.begin_op(*it->second, current_context, row_counts, order, n_threads, routing);
}

const void * on_begin_expert(void * op, int expert) {
    return Library::get().pager.begin_expert(*(Op *) op, expert);
}

void on_end_expert(void * op, int expert) {
    Library::get().pager.end_expert(*(Op *) op, expert);
}

ggml_backend_buffer_type_t registered = nullptr;

// where libspac.so lies, and the backends' modules with it
std::string library_folder() {
    Dl_info info;
    if (!dladdr((const void *) &register_buffer_type, &info) || !info.dli_fname) {
        return ".";
    }
    const std::string path = info.dli_fname;
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Upstream names each module that it loads on stderr; nobody has asked for that yet.
void load_backends() {
    ggml_log_callback log;
    void *            user_data;
    ggml_log_get(&log, &user_data);
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all_from_path(library_folder().c_str());
    ggml_log_set(log, user_data);
}

}  // namespace

ggml_backend_buffer_type_t buffer_type() {
    return registered;
}

void set_current_context(spac_context * context) {
    current_context = context;
}

int register_buffer_type() {
    if (registered) {
        return SPAC_OK;
    }
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) {  // a build with GGML_BACKEND_DL: upstream would look for the modules beside the executable, which is Python
        load_backends();
        cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }
    if (!cpu) {
        return fail(SPAC_E_BACKEND, "llama.cpp has no CPU backend loaded");
    }
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(cpu);
    auto register_buft = (void (*)(ggml_backend_buffer_type_t)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_register_extra_buft");
    auto set_callbacks = (void (*)(const ggml_mul_mat_id_callbacks *)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_set_mul_mat_id_callbacks");
    if (!register_buft || !set_callbacks) {
        return fail(SPAC_E_BACKEND, "this llama.cpp has no paging hooks: it is not the one that spac was built with (see LLAMA_CPP_LIB_PATH)");
    }
    static ggml_backend_buffer_type type = {
        /* .iface   = */ {
            /* .get_name       = */ buft_get_name,
            /* .alloc_buffer   = */ buft_alloc_buffer,
            /* .get_alignment  = */ buft_get_alignment,
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ nullptr,
            /* .is_host        = */ nullptr,  // host weights may be copied to a GPU for large batches, absent experts included
        },
        /* .device  = */ cpu,
        /* .context = */ new PagedBufferType,
    };
    static const ggml_mul_mat_id_callbacks callbacks = { on_begin_op, on_begin_expert, on_end_expert };
    Repacker::find(cpu);
    register_buft(&type);
    set_callbacks(&callbacks);
    registered = &type;
    return SPAC_OK;
}

}  // namespace spac
