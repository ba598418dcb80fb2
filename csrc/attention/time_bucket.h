// Which bucket of the time table a difference belongs to: floor(ln(max(x, 1)) / 0.301), without a logarithm.
//
// The buckets' edges are integers, found once as the smallest x for which the formula in double precision, as torch
// evaluates it on the CPU, gives the bucket; below 2^45 these are also the exact edges. An edge is 1.35 times the one
// before it, so a quarter of an octave holds at most one, save for the smallest x, where several buckets share an
// integer: bucket(x) is the bucket of the start of x's quarter, plus one from its edge on.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace hstu::attention {

// kTimeEdges[b]: the smallest difference in bucket b or a later one; no 64-bit difference has a bucket past the last.
constexpr uint64_t kTimeEdges[] = {
    0u,
    2u,
    2u,
    3u,
    4u,
    5u,
    7u,
    9u,
    12u,
    16u,
    21u,
    28u,
    38u,
    51u,
    68u,
    92u,
    124u,
    167u,
    226u,
    305u,
    412u,
    557u,
    752u,
    1016u,
    1372u,
    1854u,
    2505u,
    3385u,
    4574u,
    6180u,
    8350u,
    11283u,
    15245u,
    20600u,
    27834u,
    37610u,
    50818u,
    68666u,
    92782u,
    125367u,
    169397u,
    228891u,
    309280u,
    417902u,
    564672u,
    762990u,
    1030960u,
    1393042u,
    1882291u,
    2543369u,
    3436624u,
    4643598u,
    6274473u,
    8478127u,
    11455724u,
    15479081u,
    20915478u,
    28261189u,
    38186783u,
    51598337u,
    69720155u,
    94206525u,
    127292737u,
    171999135u,
    232406837u,
    314030289u,
    424320660u,
    573346040u,
    774710524u,
    1046796097u,
    1414440665u,
    1911205440u,
    2582438644u,
    3489415219u,
    4714930440ull,
    6370858056ull,
    8608362918ull,
    11631700390ull,
    15716862225ull,
    21236771058ull,
    28695323438ull,
    38773389087ull,
    52390965538ull,
    70791162047ull,
    95653679456ull,
    129248145233ull,
    174641301215ull,
    235976957620ull,
    318854269524ull,
    430838867570ull,
    582153502558ull,
    786611250865ull,
    1062876470327ull,
    1436168615607ull,
    1940564449431ull,
    2622108811928ull,
    3543017921206ull,
    4787358912370ull,
    6468724083690ull,
    8740600409714ull,
    11810380924256ull,
    15958297031977ull,
    21563000024645ull,
    29136127064885ull,
    39369007066311ull,
    53195770115075ull,
    71878621509799ull,
    97123064840915ull,
    131233592491847ull,
    177324056098576ull,
    239601921079807ull,
    323752354013490ull,
    437457205087951ull,
    591096262037947ull,
    798694791013878ull,
    1079203862655707ull,
    1458230340644293ull,
    1970374458392736ull,
    2662388374508177ull,
    3597444042437669ull,
    4860899995802034ull,
    6568093482609822ull,
    8874869269797366ull,
    11991806262278891ull,
    16203440643505230ull,
    21894240362561062ull,
    29583702103771238ull,
    39973774639893333ull,
    54012937709959404ull,
    72982785997608233ull,
    98615022211437624ull,
    133249539228073673ull,
    180048022160609745ull,
    243282569468860016ull,
    328725680499693217ull,
    444177210294627424ull,
    600176395848397377ull,
    810963952640968128ull,
    1095782068459071168ull,
    1480630967191749249ull,
    2000642394239962496ull,
    2703286692174004992ull,
    3652706231320924417ull,
    4935570781654962689ull,
    6668989345994283521ull,
    9011200702924931585ull,
    12176018568266122241ull,
    16452350032181552129ull,
};
constexpr int kTimeBuckets = sizeof(kTimeEdges) / sizeof(kTimeEdges[0]);

// A quarter of an octave: differences with the same highest set bit and the same two bits below it.
struct alignas(16) TimeQuarter {  // kernels read it in one piece
    uint32_t edge_low;  // the low and the high half of the edge: of a difference in 32 bits only the low one matters
    int32_t bucket;     // of the differences below the edge; the others are in the next one
    uint32_t edge_high;
    uint32_t unused;

    HSTU_HOST_DEVICE constexpr uint64_t edge() const { return uint64_t{edge_high} << 32 | edge_low; }
};

struct TimeQuarters {
    TimeQuarter at[256];

    constexpr TimeQuarters() : at{} {
        for (int quarter = 0; quarter < 256; ++quarter) {
            // [(4 + m) 2^(k - 2), (5 + m) 2^(k - 2)), from its first integer on.
            const int k = quarter / 4;
            const uint64_t numerator = 4 + quarter % 4, divisor = 4u >> (k < 2 ? k : 2);
            const uint64_t start = k < 2 ? (numerator + divisor - 1) / divisor : numerator << (k - 2);
            int bucket = 0;
            while (bucket + 1 < kTimeBuckets && kTimeEdges[bucket + 1] <= start) ++bucket;
            // The last bucket has no edge above it: all of the quarter lies past the one below.
            if (bucket == kTimeBuckets - 1) --bucket;
            const uint64_t edge = kTimeEdges[bucket + 1];
            at[quarter] = {static_cast<uint32_t>(edge), bucket, static_cast<uint32_t>(edge >> 32), 0};
        }
    }
};

// |a - b|, which may need all 64 bits.
HSTU_HOST_DEVICE uint64_t time_difference(int64_t a, int64_t b) {
    const uint64_t difference = static_cast<uint64_t>(a) - static_cast<uint64_t>(b);
    return a < b ? 0 - difference : difference;
}

// On the host; kernels find the quarter with their own instructions.
inline constexpr TimeQuarters kTimeQuarters{};
__attribute__((always_inline)) inline int time_bucket(uint64_t x) {
    x = x < 1 ? 1 : x;
    const int k = 63 - __builtin_clzll(x), m = static_cast<int>((k < 2 ? x << (2 - k) : x >> (k - 2)) & 3);
    const TimeQuarter& quarter = kTimeQuarters.at[4 * k + m];
    return quarter.bucket + (x >= quarter.edge() ? 1 : 0);
}

}  // namespace hstu::attention
