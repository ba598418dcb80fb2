// From a mask's spans to the tiles that cover them.
#pragma once

#include "attention/mask.h"

namespace hstu::attention {

// The spans with their starts moved down to multiples of `step`; empty ones stay empty.
HSTU_HOST_DEVICE Spans aligned(Spans spans, int step) {
    if (spans.first.size() > 0) spans.first.begin -= spans.first.begin % step;
    if (spans.second.size() > 0) spans.second.begin -= spans.second.begin % step;
    return spans;
}

// The tiles of at most two spans, in order. A tile starts where a span starts and never covers an index twice.
struct TileWalk {
    int first, first_tiles, second, tiles, step;

    HSTU_HOST_DEVICE TileWalk(Spans spans, int step) : step(step) {
        first = spans.first.begin;
        first_tiles = ceil_div(spans.first.size(), step);
        second = spans.second.begin;
        if (first_tiles > 0) second = max_of(second, first + first_tiles * step);
        tiles = first_tiles + ceil_div(Span{second, spans.second.end}.size(), step);
    }
    HSTU_HOST_DEVICE int operator[](int t) const {
        return t < first_tiles ? first + t * step : second + (t - first_tiles) * step;
    }
};

// Where a tile of keys stands among those that meet one tile of queries. Which tiles meet is read here from the mask's
// key spans; a walk over aligned(q_range()) says the same, for masks with cheap ranges.
struct KeyTileRank {
    int rank, count;

    template <class Mask>
    HSTU_HOST_DEVICE KeyTileRank(const Mask& mask, int row0, int rows, int col0, int cols) {
        const TileWalk walk(aligned(mask.kv_range(row0, rows), cols), cols);
        const bool in_first = walk.first_tiles > 0 && col0 < walk.first + walk.first_tiles * cols;
        rank = in_first ? (col0 - walk.first) / cols : walk.first_tiles + (col0 - walk.second) / cols;
        count = walk.tiles;
    }
};

}  // namespace hstu::attention
