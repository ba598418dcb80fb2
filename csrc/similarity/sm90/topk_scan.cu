#include "similarity/sm90/topk_scan.h"

#include <cuda_fp16.h>

#include "attention/sm90/pipeline.h"
#include "attention/sm90/product.h"

namespace hstu::similarity::sm90 {

namespace hopper = attention::sm90;
using sm80::kTileItems, attention::lane, attention::warp;

// The products of topk_scan.h: two warpgroups of 64 queries each, with all items of the tile. The tensor cores are kept
// busy by the block that shares the multiprocessor while this one's threads wait.
template <class T>
struct WarpgroupProducts {
    static constexpr int kRows = 128, kRowCount = 2, kCount = kTileItems / 4;
    hopper::Accumulator<kTileItems> acc;

    static __device__ __forceinline__ int row() { return warp() * 16 + lane() / 4; }
    static __device__ __forceinline__ int col() { return lane() % 4 * 2; }
    static __device__ __forceinline__ void landed() { hopper::fence_async(); }
    __device__ __forceinline__ void clear() { acc.clear(); }
    template <class Panel, class ItemPanel>
    __device__ __forceinline__ void add(Panel query, ItemPanel items) {
        hopper::hold(acc);
        hopper::begin_products();
        hopper::multiply<T, 4>(acc, hopper::rows(query, warp() / 4 * 64), hopper::rows(items));
        hopper::commit_products();
        hopper::wait_products<0>();
        hopper::hold(acc);
    }
    __device__ __forceinline__ float score(int r, int i) const { return acc.x[i / 2 * 4 + r * 2 + i % 2]; }
};

template <class T>
void topk_scan_round(const sm80::TopkScan& p, const sm80::Round& round, cudaStream_t stream) {
    sm80::scan_round<T, WarpgroupProducts<T>>(p, round, stream);
}
template void topk_scan_round<__nv_bfloat16>(const sm80::TopkScan&, const sm80::Round&, cudaStream_t);
template void topk_scan_round<__half>(const sm80::TopkScan&, const sm80::Round&, cudaStream_t);

}  // namespace hstu::similarity::sm90
