# CUTLASS::CUTLASS, the CUTLASS and CuTe headers: from CUTLASS_DIR, or from the Python package nvidia-cutlass, which pip
# installs as a build requirement (its module is cutlass_library). Sets CUTLASS_VERSION.
if(NOT CUTLASS_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE _cutlass_package
    OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

find_path(
  CUTLASS_INCLUDE_DIR
  NAMES cute/tensor.hpp
  PATHS ${CUTLASS_DIR} ${_cutlass_package}/source
  PATH_SUFFIXES include
  NO_DEFAULT_PATH NO_CACHE)

if(CUTLASS_INCLUDE_DIR)
  file(STRINGS ${CUTLASS_INCLUDE_DIR}/cutlass/version.h _cutlass_lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9]+" "." CUTLASS_VERSION "${_cutlass_lines}")
  string(REGEX REPLACE "^\\.|\\.$" "" CUTLASS_VERSION "${CUTLASS_VERSION}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CUTLASS REQUIRED_VARS CUTLASS_INCLUDE_DIR VERSION_VAR CUTLASS_VERSION)

if(CUTLASS_FOUND AND NOT TARGET CUTLASS::CUTLASS)
  add_library(CUTLASS::CUTLASS INTERFACE IMPORTED)
  set_target_properties(CUTLASS::CUTLASS PROPERTIES INTERFACE_INCLUDE_DIRECTORIES ${CUTLASS_INCLUDE_DIR})
endif()
