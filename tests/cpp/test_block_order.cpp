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

bool check_order(int batch, int heads, int ranks, int resident) {
    Params p;
    p.batch = batch;
    p.heads = heads;
    const BlockOrder order(p, ranks, resident);
    std::vector<char> seen(static_cast<size_t>(batch) * heads * ranks, 0);
    int last_group = 0, last_rank = 0;
    for (int block = 0; block < batch * heads * ranks; ++block) {
        const BlockOrder::Place place = order[block];
        const bool inside = place.b >= 0 && place.b < batch && place.head >= 0 && place.head < heads &&
                            place.rank >= 0 && place.rank < ranks;
        const int pair = place.b * heads + place.head, group = pair / order.group;
        const bool ordered = group == last_group ? place.rank >= last_rank : group == last_group + 1;
        if (!inside || !ordered || seen[pair * ranks + place.rank]++) {
            std::printf("batch %d heads %d ranks %d resident %d: block %d is (%d, %d, %d)\n", batch, heads, ranks,
                        resident, block, place.b, place.head, place.rank);
            return false;
        }
        last_group = group;
        last_rank = place.rank;
    }
    return true;
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
                for (int resident : {1, 5, 132, 528})
                    if (!check_order(batch, heads, ranks, resident)) return 1;

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
