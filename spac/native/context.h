// A context: one llama_context's place in its model, and the one way in which a decode fails or is cancelled.
//
// An op cannot return an error. Whoever finds one (a reading thread, a check, spac_cancel) stores it here and sets `stopped`;
// waiting compute threads wake and skip their experts, and llama.cpp's abort callback, which is polled between nodes, reads
// `stopped` and makes llama_decode return 2. Nothing computed after the error is ever used.
#pragma once

#include "include/spac.h"

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace spac {

struct Group;

// A layer being computed: from the first op on its experts until the next layer begins.
struct Visit {
    Group *              group      = nullptr;
    uint32_t             seen_parts = 0;  // bit: part whose op has begun
    std::vector<int32_t> experts;         // that this layer needs
    std::vector<uint8_t> open;            // [part * n_experts + expert]: counted in Slice::upcoming
    bool                 whole = false;   // few experts: their bundles stay together until the layer's last op has ended
};

}  // namespace spac

// the C ABI's opaque type
struct spac_context {
    bool (*user_callback)(void *) = nullptr;
    void * user_data              = nullptr;

    std::atomic<bool> stopped{ false };

    // guarded by the pager's mutex
    spac::Visit visit;
    int         last_group = 1 << 30;  // index of the group last visited: a smaller or equal one begins a ubatch
    uint64_t    end_token  = 0;        // of the ubatch, exclusive

    // The first error stays until it is taken.
    void stop(int code, int os_error, const std::string & path, uint64_t offset, uint64_t length);
    int  take(spac_error & error);

    // A graph is computed in this buffer, one page at a time: few tokens touch little of it.
    void computes_in(void * base, size_t bytes);
    // Gives back the pages of the compute buffer, if one is known: nothing in it outlives a decode, and the next one writes before it reads.
    bool trim();

  private:
    // whole pages of the compute buffer of the last graph that had paged experts; written while it is computed, read between decodes
    std::atomic<uint8_t *> compute_begin_{ nullptr };
    std::atomic<size_t>    compute_bytes_{ 0 };

    std::mutex error_mutex_;
    spac_error error_{};
};
