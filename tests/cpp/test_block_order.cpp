// Exhaustive on small launches: BlockOrder is one to one and puts heavy blocks first; FastDivisor divides.
#include "attention/sm80/block_order.h"

#include <climits>
#include <cstdio>
#include <random>
#include <vector>

using hstu::FastDivisor;
using hstu::attention::Params;
using hstu::attention::sm80::BlockOrder;

namespace {

bool check_order(int batch, int heads, int ranks, int64_t mean_length, int resident) {
    Params p;
    p.batch = batch;
    p.heads = heads;
    p.total_k = batch * mean_length;
    p.dim_qk = p.dim_v = 64;
    const BlockOrder order(p, ranks, resident, 50 << 20);
    const int pairs = batch * heads;
    std::vector<char> seen(static_cast<size_t>(pairs) * ranks, 0);
    int previous_group = 0, previous_rank = 0;
    for (int block = 0; block < pairs * ranks; ++block) {
        const BlockOrder::Place place = order[block];
        const bool inside = place.b >= 0 && place.b < batch && place.head >= 0 && place.head < heads &&
                            place.rank >= 0 && place.rank < ranks;
        const int pair = place.b * heads + place.head;
        const int group = pair / order.group < order.last_group ? pair / order.group : order.last_group;
        const bool ordered =
            group == previous_group ? place.rank >= previous_rank : group == previous_group + 1 && place.rank == 0;
        if (!inside || !ordered || seen[static_cast<size_t>(pair) * ranks + place.rank]++) {
            std::printf("batch %d heads %d ranks %d mean length %lld resident %d: block %d is (%d, %d, %d)\n", batch,
                        heads, ranks, static_cast<long long>(mean_length), resident, block, place.b, place.head,
                        place.rank);
            return false;
        }
        previous_group = group;
        previous_rank = place.rank;
    }
    // The last group evens out the end: two rounds of the GPU, or everything.
    const int last = pairs - order.last_group * order.group;
    if (last * ranks >= 2 * resident || order.last_group == 0) return true;
    std::printf("batch %d heads %d ranks %d: %d pairs in the last group\n", batch, heads, ranks, last);
    return false;
}

bool check_divisor(int n, int divisor) {
    const FastDivisor::Result result = FastDivisor(divisor).divide(n);
    if (result.quotient == n / divisor && result.remainder == n % divisor) return true;
    std::printf("%d / %d gave %d, %d\n", n, divisor, result.quotient, result.remainder);
    return false;
}

}  // namespace

int main() {
    for (int batch : {1, 2, 3, 7, 32, 257})
        for (int heads : {1, 2, 3, 4, 8})
            for (int ranks : {1, 2, 3, 8, 16, 129})
                for (int64_t mean_length : {0, 1, 200, 4096, 1000000})
                    for (int resident : {1, 5, 132, 528})
                        if (!check_order(batch, heads, ranks, mean_length, resident)) return 1;

    std::mt19937 random(0);
    std::uniform_int_distribution<int> any(1, INT_MAX);
    for (int divisor = 1; divisor <= 4096; ++divisor)
        for (int n : {0, 1, divisor - 1, divisor, divisor + 1, INT_MAX - 1, INT_MAX})
            if (!check_divisor(n, divisor)) return 1;
    for (int i = 0; i < 1000000; ++i) {
        const int divisor = any(random), n = any(random);
        if (!check_divisor(n, divisor) || !check_divisor(n / divisor * divisor, divisor)) return 1;
        if (!check_divisor(n, 1 + divisor % 65536)) return 1;
    }
    return 0;
}
