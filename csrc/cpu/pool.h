// The thread pool of all kernels.
//
// Own threads instead of OpenMP: a wheel's OpenMP is a second runtime beside
// the one torch bundles, and the two spin against each other. Here work is cut
// into fixed chunks that threads claim one by one, so
//   - the caller never waits for a thread that claimed nothing: a core taken by
//     a neighbour slows a kernel in proportion;
//   - results cannot depend on the number of threads, as long as each chunk
//     writes its own output and sums over chunks are taken in chunk order.
// A call from inside a chunk, or while another Python thread is using the pool,
// runs its chunks on the calling thread. After fork() the child starts afresh.
#pragma once

#include <cstdint>

namespace lipfast {

using ChunkFunction = void (*)(void* context, int64_t chunk);

// Runs body(context, chunk) for every chunk in [0, chunks), on up to `threads`
// threads, the caller among them; returns when all are done. chunks < 2^31. What a chunk throws, the call throws: the
// first of several, after the rest of the chunks, of which that one's neighbours may be left out.
void RunChunks(int threads, int64_t chunks, ChunkFunction body, void* context);

// The same for any callable taking the chunk's index.
template <class Body>
void ParallelFor(int threads, int64_t chunks, const Body& body) {
  RunChunks(
      threads, chunks, [](void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); },
      const_cast<Body*>(&body));
}

// Seconds that a message takes to another thread of the pool and back; 0 where none answers, as they sleep or work.
double RoundTrip();

// Ends the threads that torch's OpenMP runtime keeps for the calling thread. After a parallel operator they spin for
// milliseconds on the cores where the pool's threads are about to run; torch's next one starts them anew, which takes
// no longer than to wake them.
void EndOpenMpThreads();

}  // namespace lipfast
