#pragma once

namespace normops {

// Puts the engines behind torch's own operators, for every thread, and torch's kernels back when each call with `on`
// has been followed by one without.
void accelerate(bool on);

// The switch, which is one of those users or none.
void switch_acceleration(bool on);

}  // namespace normops
