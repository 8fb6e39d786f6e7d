// Records which experts a context's tokens are routed to, from llama.cpp's evaluation callback: any architecture, paged or
// not. It reads tensors that the graph computes anyway and changes none. Diagnostic: it stops the graph three times a layer.
#pragma once

#include "include/spac.h"

#include <deque>
#include <vector>

namespace spac {

// One layer of one ubatch.
struct RoutedLayer {
    int                  layer = 0;
    int64_t              n_tokens = 0;
    int                  n_used = 0;
    double               expert_s = 0;
    std::vector<int32_t> ids;      // [n_tokens][n_used]
    std::vector<float>   weights;
};

}  // namespace spac

// the C ABI's opaque type. One thread at a time: the one that decodes
struct spac_recorder {
    std::deque<spac::RoutedLayer> layers;
    spac::RoutedLayer             taken;           // what spac_recorder_next() points into
    double                        routed_at_s = 0;  // when the last router's results were read
    int                           n_bad = 0;       // tensors that did not look as expected
};
