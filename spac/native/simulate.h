// Replays routing through the pager's policy, and through textbook ones to compare it with. No bytes are read and no time
// passes: bundles are counted. The pager, given the same routing and a budget of as many bundles of equal size, has exactly
// these hits and misses (pager_test.cpp).
#pragma once

#include "include/spac.h"

namespace spac {

// Fills in the results. The arguments have been checked, except that ids may name no expert: such are ignored.
void simulate(spac_simulation & simulation);

}  // namespace spac
