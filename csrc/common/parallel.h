// A loop over independent items on the threads that the process already has.
#pragma once

#include <cstdint>
#include <functional>

namespace hstu {

// Calls body(item, worker) once for every item in [0, count), items handed out in order, worker < max(1, num_threads)
// and never the same at the same time. Runs on the OpenMP pool of the process (torch's) where there is one, so that two
// pools never compete for the cores, else on threads of its own; inside a parallel region it runs on the caller alone.
// The body must not throw.
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t item, int worker)>& body);

}  // namespace hstu
