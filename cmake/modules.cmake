# bulkhead_module(core/plan DEPENDS base core/mig LINK yaml-cpp)
#
# Makes one static library of a folder's *.cpp files. The folder's *_test.cpp files join the unit test program,
# *_fuzz.cpp become fuzz targets. The build stops when a file includes something the module does not declare,
# reaches for an outer ring, or looks past another folder's front header (core/plan/plan.hpp). Cycles cannot be
# declared: a module must exist before it is named.
set_property(GLOBAL PROPERTY BULKHEAD_TEST_SOURCES "")
set_property(GLOBAL PROPERTY BULKHEAD_MODULES "")

function(bulkhead_target_name out module)
  string(REPLACE "/" "_" name "bulkhead_${module}")
  set(${out} ${name} PARENT_SCOPE)
endfunction()

function(bulkhead_module module)
  cmake_parse_arguments(ARG "" "" "DEPENDS;LINK;INCLUDE" ${ARGN})
  set(dir ${CMAKE_SOURCE_DIR}/${module})
  bulkhead_target_name(target ${module})
  file(GLOB all CONFIGURE_DEPENDS ${dir}/*.cpp)
  file(GLOB headers CONFIGURE_DEPENDS ${dir}/*.hpp ${dir}/*.h)
  set(sources ${all})
  list(FILTER sources EXCLUDE REGEX "_(test|fuzz|bench)\\.cpp$")
  set(tests ${all})
  list(FILTER tests INCLUDE REGEX "_test\\.cpp$")
  set_property(GLOBAL APPEND PROPERTY BULKHEAD_TEST_SOURCES ${tests})
  set_property(GLOBAL APPEND PROPERTY BULKHEAD_MODULES ${module})

  if(sources)
    add_library(${target} STATIC ${sources} ${headers})
    set(scope PUBLIC)
    if(module STREQUAL "base")
      target_precompile_headers(${target} PRIVATE ${CMAKE_SOURCE_DIR}/base/pch.hpp)
    else()
      target_precompile_headers(${target} REUSE_FROM bulkhead_base)
    endif()
  else()
    add_library(${target} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_link_libraries(${target} ${scope} bulkhead_flags)
  target_include_directories(${target} SYSTEM ${scope} ${FMT_INCLUDE} ${ARG_INCLUDE})
  foreach(dep IN LISTS ARG_DEPENDS)
    bulkhead_target_name(dep_target ${dep})
    if(NOT TARGET ${dep_target})
      message(FATAL_ERROR "${module} DEPENDS ${dep}: no such module yet (declared later would be a cycle)")
    endif()
    target_link_libraries(${target} ${scope} ${dep_target})
  endforeach()
  target_link_libraries(${target} ${scope} ${ARG_LINK})

  # The include check runs when any file of the module changed.
  set(stamp ${CMAKE_BINARY_DIR}/includes/${target}.stamp)
  add_custom_command(OUTPUT ${stamp}
    COMMAND ${CMAKE_COMMAND} -DROOT=${CMAKE_SOURCE_DIR} -DMODULE=${module} "-DDEPENDS=${ARG_DEPENDS}" -DSTAMP=${stamp}
            -P ${CMAKE_SOURCE_DIR}/cmake/check_includes.cmake
    DEPENDS ${all} ${headers} ${CMAKE_SOURCE_DIR}/cmake/check_includes.cmake
    COMMENT "Checking the includes of ${module}" VERBATIM)
  add_custom_target(${target}_includes DEPENDS ${stamp})
  add_dependencies(${target} ${target}_includes)

  if(BULKHEAD_FUZZ)
    set(fuzzers ${all})
    list(FILTER fuzzers INCLUDE REGEX "_fuzz\\.cpp$")
    foreach(fuzzer IN LISTS fuzzers)
      get_filename_component(name ${fuzzer} NAME_WE)
      add_executable(${name} ${fuzzer})
      target_compile_options(${name} PRIVATE -fsanitize=fuzzer,address,undefined)
      target_link_options(${name} PRIVATE -fsanitize=fuzzer,address,undefined)
      target_link_libraries(${name} PRIVATE ${target})
    endforeach()
  endif()
endfunction()
